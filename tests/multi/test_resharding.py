"""A state goes from one number of ranks to another and back without changing a bit.

4 -> 2 -> 4 and 1 -> 2: each time the state is restored on the new ranks and written again, and the two generations
are compared tensor by tensor, and by their roots. Then training goes on from one state on 1, 2 and 4 ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import fullweight

from fullweight.checkpoint import store
from fullweight.checkpoint.compare import compare
from fullweight.checkpoint.generations import OnCorrupt, choose, newest
from fullweight.checkpoint.manifest import verify
from fullweight.evidence.ledger import read
from fullweight.evidence.state_root import live_root, stored_root
from fullweight.parallel.mesh import joined
from fullweight.train import resuming
from fullweight.train.assemble import assemble
from fullweight.train.loop import load_config
from fullweight.train.run_folder import RunFolder
from fullweight.train.saving import facts

SETTINGS = [
    "train.num_steps=4",
    "train.rows_per_step=4",
    "train.precision=fp32",
    "train.peak_flops_per_second=1e12",
    "optimizer.muon.ns_dtype=float32",
    "optimizer.learning_rate=3e-4",
    "eval.every=100",
    "eval.num_samples=0",
    "export.enabled=false",
]
# The first step after a restore sees the same weights: its loss differs by the order of fp32 additions only, about
# 1e-7. Updates then divide by the gradient's size; three such steps stay below 1e-5, as in test_train_fsdp.py.
FIRST, LATER = 1e-6, 1e-5


def restore_and_write(arguments: list[str]) -> int:
    """On every rank: become the run's newest state, and write it as a generation in another folder."""
    folder, target = RunFolder(Path(arguments[0])), Path(arguments[1])
    config = load_config(folder)
    with joined(config.train.device) as ranks:
        torch.manual_seed(999 + ranks.rank)  # what a restore must replace
        choice = choose(target) if target.exists() else resuming.choose(config, folder, OnCorrupt.refuse)
        run = assemble(config, folder, ranks, folder.tokenizer)
        run.state.restore(choice.generation)
        saved = store.save(target, run.state.tensors(), facts(run, None))
        live = live_root(run.state.tensors(), run.state.position())
        assert live == stored_root(verify(saved.path)), "in memory, on all ranks, and on the disk"
        run.state.loader.close()
    return 0


def trained(folder: Path, ranks: int, optimizer: str) -> Path:
    chosen = [part for s in (*SETTINGS, f"optimizer.name={optimizer}") for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", folder, ranks=ranks)
    assert ended.ok, ended.output
    return folder


def losses(folder: Path) -> list[dict[str, Any]]:
    entries = list(read(folder / "ledger.jsonl"))
    return [entry for entry in entries if entry["kind"] == "step" and entry["step"] > 4]


@pytest.mark.parametrize(
    ("path", "optimizer"),
    [
        ((4, 2, 4), "muon"),
        ((1, 2), "adamw"),
        pytest.param((4, 2, 4), "adamw", marks=pytest.mark.slow),
        pytest.param((1, 2), "muon", marks=pytest.mark.slow),
    ],
)
def test_the_state_is_bit_equal(path: tuple[int, ...], optimizer: str, tmp_path: Path) -> None:
    """Weights, moments, counters, every rank's generator, place in the data: after each change of ranks."""
    run = trained(tmp_path / "run", path[0], optimizer)
    original = verify(newest(run / "checkpoints"))
    target = tmp_path / "again"
    for ranks in path[1:]:
        call = f"{__name__}:restore_and_write"
        ended = fullweight(run, target, ranks=ranks, call=call)
        assert ended.ok, ended.output
        written = choose(target).generation
        found = compare(original, written)
        assert written.manifest.facts.world["ranks"] == ranks
        assert written.manifest.facts.position == original.manifest.facts.position
        roots = stored_root(original), stored_root(written)
        assert roots[0].parts["model"] == roots[1].parts["model"]
        assert roots[0].parts["optimizer"] == roots[1].parts["optimizer"]
        assert (roots[0] == roots[1]) == (ranks <= path[0]), "more ranks have more generators"
        new_generators = [f"random.rank_{rank}.cpu" for rank in range(path[0], ranks)]
        assert [d.name for d in found.tensors] == new_generators
        assert all(d.note == "only in the second" for d in found.tensors)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_training_goes_on_alike(optimizer: str, tmp_path: Path) -> None:
    """From one state written by two ranks: three more steps on 1, 2 and 4 ranks, losses within fp32 rounding."""
    run = trained(tmp_path / "run", 2, optimizer)
    config = run / "config.json"
    config.write_text(config.read_text().replace('"num_steps": 4', '"num_steps": 7'))
    found = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        shutil.copytree(run, folder)
        ended = fullweight("resume", folder, ranks=ranks)
        assert ended.ok, ended.output
        found[ranks] = losses(folder)
        assert [line["step"] for line in found[ranks]] == [5, 6, 7]
    for ranks in (1, 4):
        for number, (a, b) in enumerate(zip(found[2], found[ranks], strict=True)):
            assert b["tokens"] == a["tokens"]
            bound = LATER if number else FIRST
            for name in ("lm", "mtp", "indexer", "balance"):
                assert b["loss"][name] == pytest.approx(a["loss"][name], rel=bound, abs=1e-9), (ranks, name)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * bound)
