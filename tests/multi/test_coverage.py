"""Coverage of sharded runs: two ranks count and cover as one does, and so does a run resumed on one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import fullweight
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.generations import newest
from fullweight.checkpoint.manifest import verify

SETTINGS = ["eval.num_samples=0", "schedule.kind=constant", "train.precision=fp32", "train.num_steps=6"]
COUNTED = ("coverage.routed", "coverage.seen")


def command(*arguments: str | Path, ranks: int) -> str:
    done = fullweight(*arguments, ranks=ranks)
    assert done.ok, done.output
    return done.output


def counted(run: Path) -> dict[str, Tensor]:
    return dict(store.stream(verify(newest(run / "checkpoints")), COUNTED))


def coverage(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "coverage.json").read_text()))


def rows_reached(run: Path) -> tuple[int, int]:
    """Rows and elements of the embedding with a gradient."""
    embed = next(t for t in coverage(run)["tensors"] if t["name"] == "embed.weight")
    return coverage(run)["tokens_by_row"]["reached"], embed["reached"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_ranks_cover_what_one_does(optimizer: str, tmp_path: Path) -> None:
    """On two ranks, and on two to step 3 and one from there: tokens by row and by layer are those of one rank.

    Which expert a token takes may hang on rounding, so the experts of a layer are compared by their sum.
    """
    settings = [word for s in (*SETTINGS, f"optimizer.name={optimizer}") for word in ("--set", s)]
    one, two, changed = tmp_path / "one", tmp_path / "two", tmp_path / "changed"
    for run, ranks in ((one, 1), (two, 2)):
        output = command("train", "recipes/tiny_smoke.toml", *settings, "--output", run, ranks=ranks)
        assert "full-parameter: supported" in output
    short = [*settings, "--set", "train.num_steps=3"]
    command("train", "recipes/tiny_smoke.toml", *short, "--output", changed, ranks=2)
    command("resume", changed, "--set", "train.num_steps=6", ranks=1)
    alone = counted(one)
    for run in (two, changed):
        found = counted(run)
        assert torch.equal(found["coverage.seen"], alone["coverage.seen"])
        assert torch.equal(found["coverage.routed"].sum(1), alone["coverage.routed"].sum(1))
        assert coverage(run)["claim"] == {"full_parameter": "supported"}
        assert coverage(run)["counted_from_step"] == 0
        assert rows_reached(run) == rows_reached(one)
