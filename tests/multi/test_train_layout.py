"""The command line with experts dealt over ranks: answers, checkpoint, exact resume and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import Ended, fullweight

from fullweight.evidence.ledger import read

SETTINGS = [
    "train.num_steps=3",
    "train.rows_per_step=2",
    "train.precision=fp32",
    "train.peak_flops_per_second=1e12",
    "optimizer.muon.ns_dtype=float32",
    "eval.every=3",
    "eval.num_samples=3",
    "eval.max_new_tokens=6",
    "export.format=float32",
    "checkpoint.every=2",
]


def train(output: Path, ranks: int, *settings: str) -> Ended:
    chosen = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
    return fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", output, ranks=ranks)


def ledger(run: Path) -> list[dict[str, Any]]:
    lines = list(read(run / "ledger.jsonl"))
    return [{k: line[k] for k in ("kind", "step", "loss")} for line in lines if line["kind"] in ("step", "eval")]


@pytest.mark.slow
def test_dealt_experts_from_first_answer_to_export(tmp_path: Path) -> None:
    """As one rank: first answers, held-out loss, exported weights; and a resumed run repeats its losses."""
    for name, ranks, settings in (("one", 1, []), ("two", 2, ["parallel.expert=2"])):
        ended = train(tmp_path / name, ranks, *settings)
        assert ended.ok, ended.output
    one, two = tmp_path / "one", tmp_path / "two"
    answers = [json.loads((run / "samples" / "step-0.json").read_text()) for run in (one, two)]
    assert len(answers[0]) == 3
    assert answers[0] == answers[1], "the same weights answer alike, in the same order"
    for a, b in zip(ledger(one), ledger(two), strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=1e-9)
    exports = [load_file(next((run / "export").glob("*.safetensors"))) for run in (one, two)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        if "hc_" not in name:  # see test_layouts.py
            torch.testing.assert_close(exports[1][name], tensor, rtol=1e-3, atol=1e-4)
    before = ledger(two)
    shutil.rmtree(two / "checkpoints" / "step-3")
    ended = fullweight("resume", two, "--on-corrupt", "previous", ranks=2)
    assert ended.ok, ended.output
    assert ledger(two) == before
