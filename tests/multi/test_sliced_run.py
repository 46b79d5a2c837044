"""A whole run whose rows are shared by ranks: its records, held-out loss, answers, export and resume.

`test_layouts.py` compares steps; here the command line runs, and everything around a step has to count a row once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.multi.test_layout_states import restore_and_write
from tests.processes import fullweight

from fullweight.checkpoint.compare import compare
from fullweight.checkpoint.generations import choose, newest
from fullweight.checkpoint.manifest import verify
from fullweight.evidence.ledger import read

SETTINGS = [
    "train.num_steps=4",
    "train.rows_per_step=2",
    "train.precision=fp64",
    "optimizer.muon.ns_dtype=float64",
    "train.peak_flops_per_second=1e12",
    "eval.every=4",
    "eval.num_samples=2",
    "eval.max_new_tokens=4",
    "checkpoint.every=2",
    "export.format=float32",
]
# fp64 throughout: what differs is the order of sums, about 1e-16 of them
BOUND = 1e-10


def train(run: Path, ranks: int, *settings: str) -> None:
    chosen = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=ranks)
    assert ended.ok, ended.output


def ledger(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = list(read(run / "ledger.jsonl"))
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(
    ("tokens", "ranks", "axes"),
    [
        (256, 2, ("tensor=2",)),
        (512, 4, ("context=2", "tensor=2")),
        (256, 4, ("context=2", "expert=2")),
    ],
)
@pytest.mark.slow
def test_a_shared_row_counts_once(tokens: int, ranks: int, axes: tuple[str, ...], tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    train(one, 1, f"data.row_tokens={tokens}")
    train(many, ranks, f"data.row_tokens={tokens}", *(f"parallel.{axis}" for axis in axes))
    for a, b in zip(ledger(one, "step"), ledger(many, "step"), strict=True):
        for exact in ("batch", "tokens", "experts", "parameters", "without_gradient", "unseen_embeddings"):
            assert b[exact] == a[exact], exact
        assert b["loss"] == pytest.approx(a["loss"], rel=BOUND)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=BOUND)
        flops = [r["model_flops_per_second"] * r["seconds"]["total"] for r in (a, b)]
        assert flops[1] == pytest.approx(flops[0], rel=1e-9), "each document's FLOPs count once"
    for a, b in zip(ledger(one, "eval"), ledger(many, "eval"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=BOUND)
    for step in (0, 4):
        assert (many / f"samples/step-{step}.json").read_text() == (one / f"samples/step-{step}.json").read_text()
    assert_same_export(one / "export", many / "export")
    before = ledger(many, "step")
    shutil.rmtree(many / "checkpoints" / "step-4")
    ended = fullweight("resume", many, "--on-corrupt", "previous", ranks=ranks)
    assert ended.ok, ended.output
    for a, b in zip(before, ledger(many, "step"), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])


def assert_same_export(one: Path, many: Path) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in many.glob("*.safetensors"))
    for name in files:
        other = load_file(many / name)
        for key, tensor in load_file(one / name).items():
            if tensor.is_floating_point():
                # fp64 weights apart by their last bits round to neighbouring fp32 numbers now and then
                torch.testing.assert_close(other[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
            else:
                assert torch.equal(other[key], tensor), key


@pytest.mark.slow
def test_a_state_of_divided_heads_goes_anywhere_bit_for_bit(tmp_path: Path) -> None:
    """Matrices cut by heads and by FSDP, and their moments: to one rank, to heads alone, and back."""
    run, again = tmp_path / "run", tmp_path / "again"
    short = ("train.num_steps=2", "data.row_tokens=512", "eval.num_samples=0", "export.enabled=false")
    train(run, 4, *short, "parallel.context=2", "parallel.tensor=2")
    original = verify(newest(run / "checkpoints"))
    assert original.manifest.facts.world["axes"]["tensor"] == 2
    for ranks, context, tensor in ((1, 1, 1), (2, 1, 2), (4, 2, 2), (4, 4, 1)):
        settings = [f"parallel.context={context}", f"parallel.tensor={tensor}"]
        call = f"{restore_and_write.__module__}:{restore_and_write.__name__}"
        ended = fullweight(run, again, *settings, ranks=ranks, call=call)
        assert ended.ok, ended.output
        assert compare(original, choose(again).generation).tensors == []
