"""Boundaries that several ranks stored together are repeated by one process, a piece or a stage alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.processes import fullweight

SETTINGS = [
    "train.num_steps=3",
    "train.rows_per_step=4",
    "train.precision=fp32",
    "train.peak_flops_per_second=1e12",
    "optimizer.muon.ns_dtype=float32",
    "checkpoint.keep=3",
    "boundaries.every=2",
    "eval.num_samples=0",
    "eval.every=100",
    "export.enabled=false",
]
LAYOUTS = {
    "shards": ("shard=2",),
    "experts dealt": ("expert=2",),
    "stages": ("pipeline=2",),
    "rows in slices": ("context=2",),
    "heads": ("tensor=2",),
    "stages in a V": ("pipeline=2", "schedule='zbv'", "virtual_stages=2"),
}
FILES = {"shards": 14, "experts dealt": 14, "stages": 7, "rows in slices": 14, "heads": 14, "stages in a V": 7}


def replayed(run: Path, report: Path, *arguments: str) -> list[dict[str, Any]]:
    ended = fullweight("replay", run, "--level", "layer", *arguments, "--json", report)
    assert ended.ok, ended.output
    return list(json.loads(report.read_text()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_of_a_layout_are_repeated_alone(layout: str, tmp_path: Path) -> None:
    """Weights after the step included; neighbours meet across ranks; another layout counts as another stack."""
    run, report = tmp_path / "run", tmp_path / "report.json"
    chosen = [part for s in SETTINGS for part in ("--set", s)]
    chosen += [part for s in LAYOUTS[layout] for part in ("--set", f"parallel.{s}")]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=2)
    assert ended.ok, ended.output
    assert len(list((run / "boundaries" / "step-3").glob("*.safetensors"))) == FILES[layout]

    found = replayed(run, report)
    assert [r["piece"] for r in found] == ["embedding", "layer-0", "layer-1", "layer-2", "layer-3", "mtp", "head"]
    for result in found:
        assert result["verdict"] == "verified", result
        assert result["after"]
        assert result["bound_in_ledger"]
        assert [reason.partition(":")[0] for reason in result["stack"]] == ["layout"]
        assert max(result["distances"].values(), default=0.0) < result["bound"] == 1e-3

    if layout == "stages":
        stages = [replayed(run, report, "--layer", f"stage-{i}")[0] for i in range(2)]
        assert [r["piece"].partition(" ")[0] for r in stages] == [
            "embedding",
            stages[1]["piece"].partition(" ")[0],
        ]
        assert stages[1]["piece"].endswith("to head")
        assert [r["verdict"] for r in stages] == ["verified"] * 2
        assert sum(r["num_bytes"] for r in stages) == sum(r["num_bytes"] for r in found)
