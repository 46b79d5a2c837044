"""What a resumed run may change, and that every other setting is refused with its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.train.changing import MAY_CHANGE, WHY_NOT, changed, check_length
from fullweight.train.config import RunConfig

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny_smoke.toml"


def recipe() -> RunConfig:
    return RunConfig.from_toml(RECIPE)


def test_every_setting_is_in_one_of_the_lists() -> None:
    """A setting that somebody adds has to be decided on; a section is either whole or told key by key."""
    listed = [*MAY_CHANGE, *WHY_NOT]
    for section, field in RunConfig.model_fields.items():
        whole = section in listed
        keys = getattr(field.annotation, "model_fields", {})
        split = [f"{section}.{key}" for key in keys if f"{section}.{key}" in listed]
        assert whole or (keys and len(split) == len(keys)), f"{section}: {set(keys)}"
    assert not set(MAY_CHANGE) & set(WHY_NOT)


@pytest.mark.parametrize(
    "override",
    [
        "train.num_steps=40",
        "optimizer.learning_rate=1e-4",
        "optimizer.adamw.eps=1e-9",
        "schedule.warmup_steps=3",
        "checkpoint.every=1",
        "eval.num_samples=0",
        "guard.max_skips=7",
        "export.format=fp8",
        "parallel.recompute=full",
        "data.prefetch=3",
    ],
)
def test_what_may_change(override: str) -> None:
    """How long, how fast, where: taken, and nothing else is another."""
    config = recipe()
    new = changed(config, [override])
    assert new != config
    assert changed(new, []) == new


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.preset=small", "holds the weights of this model"),
        ("model.changes.num_hidden_layers=4", "holds the weights of this model"),
        ("data.seed=4", "place in the data"),
        ("data.row_tokens=512", "place in the data"),
        ("data.encoding.name=deepseek-v4-0731", "place in the data"),
        ("tokenizer.vocab_size=400", "vocabulary"),
        ("optimizer.name=adamw", "moments of this optimiser"),
        ("train.seed=9", "drawn from it"),
        ("train.rows_per_step=4", "this many rows"),
        ('train.frozen=["embed.weight"]', "moments of what trains"),
        ("train.indexer_loss=none", "another run"),
        ("output=elsewhere", "move the folder"),
    ],
)
def test_what_may_not(override: str, reason: str) -> None:
    """Refused by key, with both values and the reason."""
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"cannot change {re.escape(key)}.*{reason}"):
        changed(recipe(), [override])


def test_another_method_is_another_run() -> None:
    """The last key of the lists, with more than one thing refused at once."""
    with pytest.raises(ConfigError, match=r"unknown key method\."):
        changed(recipe(), ["method.nonsense=1"])
    with pytest.raises(ConfigError, match=r"name .*\n.*train\.seed"):
        changed(recipe(), ["name=x", "train.seed=3"])


def test_a_run_does_not_end_before_it_is() -> None:
    """The checkpoint's step is the least that num_steps can be."""
    check_length(recipe(), recipe().train.num_steps)
    with pytest.raises(ConfigError, match=r"num_steps=12 ends before the checkpoint, which is of step 13"):
        check_length(recipe(), 13)
