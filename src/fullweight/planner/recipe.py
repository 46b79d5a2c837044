"""The chosen layout as a recipe that `fullweight train` and `fullweight rehearse` read. Imports no torch."""

from __future__ import annotations

from typing import Any

import tomli_w

from fullweight.models.deepseek_v4.config import PRESETS
from fullweight.parallel.config import ParallelConfig
from fullweight.planner.search import Candidate, Request

_ADAMW = {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.01}
_RELEASED_VOCABULARY = 129280
"""Presets for tests have less, and train a tokenizer of their own."""
_MUON = {"name": "muon", "learning_rate": 1e-5}


SOURCES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "file", "path": "data/sft.jsonl"},
    "pretrain": {"kind": "file", "path": "data/text.jsonl", "columns": {"text": "text"}},
}
"""By method, a place holder for its data."""


def recipe_text(request: Request, candidate: Candidate, method: str = "sft") -> str:
    """A recipe of that method in this layout; its data are a place holder."""
    preset = request.model.removeprefix("deepseek-v4-")
    defaults = ParallelConfig()
    parallel = {
        name: value
        for name, value in candidate.parallel.model_dump(mode="json").items()
        if value not in (getattr(defaults, name), None, [])
    }
    row_tokens = request.sequence * candidate.documents
    values: dict[str, Any] = {
        "name": f"{preset if preset in PRESETS else 'model'}_{request.chip.name}_{request.ranks}",
        "model": {"preset": preset} if preset in PRESETS else {"config": request.model},
        "data": {"row_tokens": row_tokens, "sources": [SOURCES[method]]},
        "method": {"name": method},
        "optimizer": _ADAMW if request.optimizer == "adamw" else _MUON,
        "schedule": {"kind": "cosine", "warmup_steps": 25},
        "train": {"num_steps": 500, "rows_per_step": request.global_batch // candidate.documents},
        "parallel": parallel,
        "eval": {"num_samples": 0},
        "checkpoint": {"every": 100},
    }
    if (
        preset in PRESETS and request.config.vocab_size < _RELEASED_VOCABULARY
    ):  # presets for tests, which train a tokenizer of their own
        values["tokenizer"] = {"vocab_size": request.config.vocab_size}
    ranks = f"{request.ranks} {'rank' if request.ranks == 1 else 'ranks'}"
    head = (
        f"# Planned for {ranks} of {request.chip.name}: a step of about {candidate.seconds:.1f} s,\n"
        f"# at most {candidate.fullest.peak / 2**30:.1f} of {candidate.usable / 2**30:.1f} GiB, both by count.\n"
        f"# A row is {candidate.documents} x {request.sequence} tokens, so a step has {request.global_batch} x "
        f"{request.sequence} of them.\n"
        "# Neither rehearsed nor run. Replace data.sources, the learning rate and the number of steps.\n"
    )
    return head + tomli_w.dumps(values)
