"""Two ranks give the loss curve of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fullweight.evidence.ledger import read

ROOT = Path(__file__).parents[2]
SETTINGS = ["train.num_steps=10", "train.precision=fp32", "optimizer.learning_rate=3e-4", "eval.every=10"]
SETTINGS += [
    "optimizer.muon.ns_dtype=float32",
    "eval.num_samples=3",
    "eval.max_new_tokens=6",
    "export.format=float32",
    "checkpoint.every=5",
]

# Newton-Schulz in fp32 as everything else: its default, bf16, turns a last-bit difference into 1e-3 of an update.
# Two ranks add the same fp32 numbers in another order: 2^-24 = 6e-8 relative in a sum. Ten steps of an optimiser
# that divides by the gradient's own size amplify it, here to about 1e-6 in the loss; 1e-5 leaves room for other
# machines and is far below what a wrong normaliser (factor 2) or a lost micro-batch would do.
BOUND = 1e-5


def train(output: Path, ranks: int, optimizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "fullweight"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += ["-m", "fullweight"]
    command = arguments or ("train", "recipes/tiny_smoke.toml", "--output", str(output))
    if not arguments:
        for setting in (*SETTINGS, f"optimizer.name={optimizer}"):
            command += ("--set", setting)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500
    )


def ledger(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = list(read(run / "ledger.jsonl"))
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_ranks_follow_one(optimizer: str, tmp_path: Path) -> None:
    """Same global batch, sharded parameters: losses, counts, exported weights and held-out loss agree."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path / str(ranks)
        done = train(runs[ranks], ranks, optimizer)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("step 10/10") == 1, "rank 0 alone prints"
    one, two = (ledger(runs[r], "step") for r in (1, 2))
    assert [s["step"] for s in two] == list(range(1, 11))
    for a, b in zip(one, two, strict=True):
        assert b["tokens"] == a["tokens"]
        assert b["batch"] == a["batch"], "the same rows in the same order"
        assert b["without_gradient"] == a["without_gradient"]
        assert b["unseen_embeddings"] == a["unseen_embeddings"]
        assert b["loss"]["lm"] == pytest.approx(a["loss"]["lm"], rel=BOUND)
        assert b["loss"]["mtp"] == pytest.approx(a["loss"]["mtp"], rel=BOUND)
        assert b["total_loss"] == pytest.approx(a["total_loss"], rel=BOUND)
    roots = {json.loads((runs[r] / "manifest.json").read_text())["initial"]["weights_root"] for r in (1, 2)}
    assert len(roots) == 1, "sharded or not, the same first weights"
    # Before the weights could drift apart every component and the gradient agree to rounding.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-6)
    assert two[0]["experts"] == one[0]["experts"]
    for a, b in zip(ledger(runs[1], "eval"), ledger(runs[2], "eval"), strict=True):
        assert b["loss"]["lm"] == pytest.approx(a["loss"]["lm"], rel=BOUND)
    first = [json.loads((runs[r] / "samples" / "step-0.json").read_text()) for r in (1, 2)]
    assert first[0] == first[1], "the same weights answer alike, in the same order"
    _assert_exports_close(runs[1] / "export", runs[2] / "export")


def _assert_exports_close(one: Path, two: Path) -> None:
    for path in sorted(one.glob("*.safetensors")):
        other = load_file(two / path.name)
        for name, tensor in load_file(path).items():
            assert other[name].shape == tensor.shape
            if tensor.is_floating_point() and "bias" not in name:
                # 10 steps at 3e-4: an entry whose gradient is rounding noise may have gone the other way.
                assert (other[name] - tensor).abs().max() <= 2 * 10 * 3e-4, name
            elif not tensor.is_floating_point():
                assert torch.equal(other[name], tensor), name


def test_resuming_two_ranks_is_exact(tmp_path: Path) -> None:
    """Sharded state comes back bit for bit: losses and gradients are those of the run that was not interrupted."""
    run = tmp_path / "run"
    assert train(run, 2, "muon").returncode == 0
    before = ledger(run, "step")
    shutil.rmtree(run / "checkpoints" / "step-10")
    done = train(run, 2, "muon", "resume", str(run), "--on-corrupt", "previous")
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(before, ledger(run, "step"), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])


def test_a_mistake_under_torchrun_ends_every_rank(tmp_path: Path) -> None:
    """Rows that cannot be dealt to two ranks are refused on both; nobody waits for the other."""
    arguments = [
        "train",
        "recipes/tiny_smoke.toml",
        "--set",
        "train.rows_per_step=3",
        "--output",
        str(tmp_path / "x"),
    ]
    done = train(tmp_path / "x", 2, "muon", *arguments)
    assert done.returncode != 0
    assert "not divisible by the number of ranks" in done.stderr
    assert not (tmp_path / "x").exists()
