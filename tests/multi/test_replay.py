"""A run of two ranks is repeated on two, bit for bit, and on one, within the bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.processes import fullweight

SETTINGS = [
    "train.num_steps=4",
    "train.rows_per_step=4",
    "train.precision=fp32",
    "train.peak_flops_per_second=1e12",
    "optimizer.muon.ns_dtype=float32",
    "checkpoint.every=2",
    "eval.num_samples=0",
    "eval.every=100",
    "export.enabled=false",
]


def replayed(run: Path, report: Path, ranks: int) -> dict[str, Any]:
    ended = fullweight("replay", run, "--json", report, ranks=ranks)
    assert ended.ok, ended.output
    [found] = json.loads(report.read_text())
    assert found["window"] == {"start": 2, "stop": 4}
    assert found["verdict"] == "verified"
    return dict(found)


def test_two_ranks_are_repeated_on_two_and_on_one(tmp_path: Path) -> None:
    """The layout is part of what bits depend on: the same one gives the same root, another rounds otherwise."""
    run, report = tmp_path / "run", tmp_path / "report.json"
    chosen = [part for s in SETTINGS for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=2)
    assert ended.ok, ended.output

    same = replayed(run, report, 2)
    assert (same["agreement"], same["stack"]) == ("bit-exact", [])
    assert same["roots"][0] == same["roots"][1]

    other = replayed(run, report, 1)
    assert other["agreement"] != "neither"
    assert [reason.partition(":")[0] for reason in other["stack"]] == ["layout"]
    assert other["distance"]["effect"] < other["bound"] == 1e-3
