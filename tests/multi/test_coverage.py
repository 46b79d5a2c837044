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
from fullweight.evidence.coverage_report import differences
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

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


LAYOUTS = {
    "pipeline": (2, ("parallel.pipeline=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "pipeline, tensor, expert": (4, ("parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=2")),
}
EXACT = ("train.precision=fp64", "optimizer.muon.ns_dtype=float64", "train.rows_per_step=4", "train.num_steps=3")
EXACT += ("train.peak_flops_per_second=1e12", "eval.num_samples=0", "schedule.kind=constant")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that those of every layout are compared with."""
    return in_layout(tmp_path_factory.mktemp("one") / "run", 1)


def in_layout(run: Path, ranks: int, *settings: str) -> Path:
    chosen = [word for s in (*EXACT, *settings) for word in ("--set", s)]
    output = command("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=ranks)
    assert "full-parameter: supported" in output
    return run


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] if ranks > 2 else []) for n, (ranks, _) in LAYOUTS.items()]
)
def test_every_layout_covers_what_one_rank_does(layout: str, one_rank: Path, tmp_path: Path) -> None:
    """In fp64: every count of every tensor, expert and row, every verdict, and norms; totals are the model's."""
    ranks, settings = LAYOUTS[layout]
    run = in_layout(tmp_path / "run", ranks, *settings)
    alone, found = coverage(one_rank), coverage(run)
    total = DeepSeekV4Config.preset("tiny").num_parameters(mtp=True)
    for content in (alone, found):
        assert content["parameters"] == {"total": total, "trained": total}
        assert sum(tensor["elements"] for tensor in content["tensors"]) == content["totals"]["elements"] == total
    assert differences(alone, {**found, "manifest_sha256": alone["manifest_sha256"]}) == []
    for name, tensor in counted(run).items():
        assert torch.equal(tensor, counted(one_rank)[name])
    written = tmp_path / "again.json"
    command("coverage", run, "--json", written, ranks=1)
    assert differences(found, json.loads(written.read_text())) == []
