"""What of a run's configuration may be another one when it is resumed, and why the rest may not.

A checkpoint is a state of one model, reached on one order of data, under one objective. What only says how long,
how fast and where to go on may change; what the state itself is made of may not: another model, data, method or
objective is another run, which starts from this one's export. A new setting has to be put into one of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.checkpoint.compare import changes
from fullweight.core.config import apply_overrides
from fullweight.core.errors import ConfigError
from fullweight.train.config import RunConfig

MAY_CHANGE = (
    "device",
    "data.cache_folder",
    "data.prefetch",
    "optimizer.adamw",
    "optimizer.clip_norm",
    "optimizer.learning_rate",
    "optimizer.muon",
    "optimizer.weight_decay",
    "schedule",
    "train.device",
    "train.loss",
    "train.num_steps",
    "train.peak_flops_per_second",
    "train.precision",
    "ops",
    "parallel",
    "guard",
    "eval",
    "boundaries",
    "checkpoint",
    "export",
    "launch",
    "trackers",
)
"""Keys, or sections with all that is in them."""
_ANOTHER_RUN = "another objective is another run: start one from this run's export"
WHY_NOT = {
    "name": "the run has its name",
    "output": "the run is where its folder is; move the folder instead",
    "model": "the checkpoint holds the weights of this model",
    "data": "the checkpoint's place in the data counts these samples in this order",
    "tokenizer": "the model was trained on this vocabulary",
    "method": _ANOTHER_RUN,
    "optimizer.name": "the checkpoint holds the moments of this optimiser",
    "train.csa_attention": _ANOTHER_RUN,
    "train.indexer_loss": _ANOTHER_RUN,
    "train.rows_per_step": "steps of the schedule and of the checkpoint are this many rows",
    "train.seed": "what was drawn so far was drawn from it",
    "train.trainable": "the checkpoint holds moments of what trains, and of nothing else",
    "train.frozen": "the checkpoint holds moments of what trains, and of nothing else",
}


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with `a.b=c` overrides. Raises ConfigError on a wrong one, or one that may not change."""
    before = config.model_dump(mode="json")
    after = RunConfig.resolve(apply_overrides(before, overrides), "the run's configuration with --set")
    refused = []
    for key, (old, new) in changes(before, after.model_dump(mode="json")).items():
        if _entry(key, MAY_CHANGE) is None:
            reason = WHY_NOT[_entry(key, tuple(WHY_NOT)) or "method"]
            refused.append(f"{key} ({old!r} -> {new!r}): {reason}")
    if refused:
        raise ConfigError("a run that is resumed cannot change " + "\n  ".join(refused))
    return after


def check_length(config: RunConfig, step: int) -> None:
    """Raise ConfigError when the run would end before the step that it is at."""
    if config.train.num_steps < step:
        raise ConfigError(
            f"train.num_steps={config.train.num_steps} ends before the checkpoint, which is of step {step}; "
            f"use at least {step}"
        )


def _entry(key: str, entries: Sequence[str]) -> str | None:
    return next((e for e in entries if key == e or key.startswith(f"{e}.")), None)
