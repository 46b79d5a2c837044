"""Experts that the shards cannot share matrix by matrix: cut by rows for AdamW, left whole for Muon.

Six experts over two expert ranks leave three to each pair of shards. That losses and weights are those of one rank
is in `test_layouts.py`; here is who holds what, and that the state and the export are the same on any ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.multi.layouts import Case, recipe
from tests.multi.test_layout_states import SETTINGS
from tests.processes import fullweight
from torch.distributed.tensor import DTensor

import fullweight as package
from fullweight.checkpoint.compare import compare
from fullweight.checkpoint.generations import choose, newest
from fullweight.checkpoint.manifest import verify
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.optim.clip import local_norms
from fullweight.parallel.mesh import joined
from fullweight.train.assemble import assemble
from fullweight.train.run_folder import RunFolder
from fullweight.train.state import load_weights

SIX = "model.changes.n_routed_experts=6"


def write_shares(arguments: list[str]) -> int:
    """On every rank: the shapes of its parts of the first layer's experts, by optimiser and expert ranks."""
    shapes = {}
    with joined("cpu") as ranks:
        for optimizer in ("adamw", "muon"):
            for expert in (1, 2):
                case = Case(4, (SIX, f"optimizer.name={optimizer}", f"parallel.expert={expert}"))
                run = assemble(recipe(case), RunFolder(Path("never-written")), ranks)
                run.state.loader.close()
                experts = run.model.layers[0].ffn.experts
                parts = [p.to_local() for p in experts.parameters() if isinstance(p, DTensor)]
                shapes[optimizer, expert] = [tuple(part.shape) for part in parts]
                assert len(local_norms(parts)) == 2
        torch.save(shapes, Path(arguments[0]) / f"{ranks.rank}.pt")
        ranks.barrier()
    return 0


def test_who_holds_what(tmp_path: Path) -> None:
    """Rows of all experts on every rank under AdamW; whole matrices under Muon, so some ranks hold fewer."""
    ended = fullweight(tmp_path, ranks=4, call=f"{__name__}:write_shares")
    assert ended.ok, ended.output
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    gate_up, down = (64, 64), (64, 32)  # a matrix of the preset `tiny`
    for rank in found:
        assert rank["adamw", 2] == [(3, gate_up[0] // 2, gate_up[1]), (3, down[0] // 2, down[1])]
        assert rank["adamw", 1] == [(6, gate_up[0] // 4, gate_up[1]), (6, down[0] // 4, down[1])]
    for expert, counts in ((2, [2, 2, 1, 1]), (1, [2, 2, 2, 0])):
        for rank, count in zip(found, counts, strict=True):
            assert rank["muon", expert] == [(count, *gate_up), (count, *down)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on 2 x 2 ranks, saved and exported."""
    run = tmp_path_factory.mktemp("rows") / "run"
    settings = [s for s in SETTINGS if not s.startswith("export.")]
    settings += [SIX, "optimizer.name=adamw", "export.format=float32"]
    chosen = [part for s in settings for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=4)
    assert ended.ok, ended.output
    return run


def test_the_export_is_the_checkpoint(trained: Path) -> None:
    """Every weight, read by one process from either."""
    loaded = package.load(trained / "export")
    exported = loaded.model.state_dict()
    assert loaded.config.n_routed_experts == 6
    model = DeepSeekV4(loaded.config, ops="reference")
    load_weights(model, verify(newest(trained / "checkpoints")))
    assert [n for n, tensor in model.state_dict().items() if not torch.equal(exported[n], tensor)] == []


@pytest.mark.slow
def test_the_state_is_bit_equal_on_other_ranks(trained: Path, tmp_path: Path) -> None:
    """On one rank, then cut by rows over four, then as it was."""
    original = verify(newest(trained / "checkpoints"))
    for ranks, expert in ((1, 1), (4, 1), (4, 2)):
        settings = ["train.rows_per_step=8", f"parallel.expert={expert}"]
        call = "tests.multi.test_layout_states:restore_and_write"
        ended = fullweight(trained, tmp_path / "again", *settings, ranks=ranks, call=call)
        assert ended.ok, ended.output
        written = choose(tmp_path / "again").generation
        assert written.manifest.facts.position == original.manifest.facts.position
        assert compare(original, written).tensors == []
