"""The planner's step of Muon beside recorded rehearsals, beside `optim/muon.py`'s own division, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.roles import parameter_role
from fullweight.optim import muon as real
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner import muon
from fullweight.planner.chips import chip
from fullweight.planner.memory import MemoryModel
from fullweight.planner.recorded import planned_updates
from fullweight.planner.search import Planner, Request
from fullweight.planner.shards import block_shapes, root_shapes

FILE = Path(__file__).with_name("rehearsed.json")
RECORDS: list[dict[str, Any]] = [r for r in json.loads(FILE.read_text()) if r["optimizer"] == "muon"]
PRO, TINY = DeepSeekV4Config.preset("pro"), DeepSeekV4Config.preset("tiny")


def test_there_are_recorded_steps() -> None:
    assert {r["model"]["preset"] for r in RECORDS} == {"tiny", "flash"}
    for axis in ("expert", "tensor", "replicate", "pipeline"):
        assert any(axis in r["parallel"] for r in RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["name"])
def test_calls_bytes_and_products_are_those_of_a_rehearsal(record: dict[str, Any]) -> None:
    """To the byte and the FLOP. Where rows are cut, a rehearsal traces the last rank of a row, not the first."""
    updates = planned_updates(record)
    first = record["parallel"].get("tensor", 1) * record["parallel"].get("context", 1) == 1
    for role in record["roles"]:
        update, said = updates[role["pipeline"]], role["muon"]
        assert update.calls == said["calls"]
        if first:
            assert update.bytes_given == said["bytes_given"]
            assert added_products(update) == said["baddbmm_flops"]
        else:
            assert update.bytes_given == pytest.approx(said["bytes_given"], rel=0.03)
            assert added_products(update) == pytest.approx(said["baddbmm_flops"], rel=0.03)


def added_products(update: muon.Update) -> int:
    """FLOPs of ten iterations' products of the square with itself and with the matrix."""
    flops = 0
    for (rows, columns), count in update.own.items():
        n, m = min(rows, columns), max(rows, columns)
        flops += count * 10 * (2 * n * n * n + 2 * n * n * m)
    return flops


def every_stack(config: DeepSeekV4Config, layout: Layout) -> list[muon.Stack]:
    shapes = list(root_shapes(config, first=True, last=True))
    for layer in range(config.num_hidden_layers + 1):
        shapes += block_shapes(config, layer)
    found = (muon.stack_of(config, layout, name, shape) for name, shape in shapes)
    return [stack for stack in found if stack is not None]


def test_one_rank_makes_every_matrix_of_the_model_orthogonal() -> None:
    """By the model's parameters and roles: 10 iterations of two products of n x n x m and one of n x n x n."""
    model, flops, numbers = DeepSeekV4(TINY), 0, 0
    for name, parameter in model.named_parameters():
        role = parameter_role(name, TINY)
        if role.optimizer == "muon":
            columns = parameter.shape[-1]
            rows = parameter.numel() // columns // role.num_matrices
            n, m = min(rows, columns), max(rows, columns)
            flops += role.num_matrices * 10 * (2 * 2 * n * n * m + 2 * n * n * n)
            numbers += parameter.numel()
    update = muon.update_of(every_stack(TINY, Layout()))
    assert update.flops == flops
    assert update.entries == numbers
    assert update.calls == update.bytes_given == 0


@pytest.mark.parametrize("ranks", [2, 3, 7, 16, 1000])
def test_owners_are_those_that_the_optimiser_chooses(ranks: int) -> None:
    shapes = [(64, 128), (128, 64), (300, 300), (64, 128), (4096, 4096), (24, 512), (5000, 1700)] * 9
    piece = torch.zeros(0)
    work = real._Work(piece, piece, piece, 0.9, 0.1)
    theirs = list(real._rounds([real._CutMatrix(shape, (), work) for shape in shapes], ranks))
    mine = list(muon._rounds([muon._Cut(shape, 0, False) for shape in shapes], ranks))
    assert [[[c.matrix for c in batch] for batch in owned] for owned in mine] == [
        [[m.shape for m in batch] for batch in owned] for owned in theirs
    ]


def test_three_experts_on_sixteen_ranks_leave_thirteen_idle() -> None:
    """Pro, 2,048 ranks, experts over 128: whoever has one makes three matrices orthogonal, of each block."""
    layout = Layout(shard=2048, expert=128)
    stacks = [s for s in every_stack(PRO, layout) if s.mesh == "experts"]
    assert len(stacks) == 2 * (PRO.num_hidden_layers + 1)
    assert {(s.matrix, s.whole, s.piece) for s in stacks} == {
        ((3072, 7168), 2, ()),
        ((7168, 3072), 1, ()),
    }
    one = 20 * (2 * 3072**2 * 7168 + 3072**3)
    assert muon.update_of(stacks).flops == 3 * one * (PRO.num_hidden_layers + 1)


def test_a_cut_matrix_travels_whole_to_its_owner_and_back() -> None:
    """Four ranks, one matrix of 1,024 x 512: 256 rows of each go to the owner in fp32, and back in BF16."""
    stack = muon.Stack((1024, 512), 1, "dense", 4, 0, (256 * 512,), narrow=False, entries=256 * 512)
    update = muon.update_of([stack])
    whole = 1024 * 512
    assert (update.calls, update.bytes_given) == (2, 4 * whole // 4 + 2 * whole)
    assert update.bytes_waited == (4 + 2) * whole
    communication = muon.profile_of([stack]).most[5]
    assert communication == max(4 * whole // 4 + 4 * whole, 4 * whole + 2 * whole + 2 * whole // 4)


def planner(optimizer: str, **changes: Any) -> Planner:
    config = DeepSeekV4Config.preset("flash")
    return Planner(Request("flash", config, chip("ascend-910c"), 128, 4096, 256, optimizer, **changes))


def test_a_step_takes_longer_by_what_muon_does() -> None:
    """Beside AdamW: products at the rate of others, pieces over the links that join a stage's ranks."""
    parallel = ParallelConfig(expert=64, recompute="full")
    muons, adamw = planner("muon"), planner("adamw")
    found, plain = muons.evaluated(parallel), adamw.evaluated(parallel)
    update = found.job.muon
    assert update is not None
    assert plain.job.muon is None
    assert plain.time.newton_schulz == plain.time.pieces == 0
    assert found.time.newton_schulz > update.flops / 376e12
    link = found.job.chip.link(128)
    assert found.time.pieces == pytest.approx(update.bytes_waited / (link.bandwidth * 1e9))
    assert found.time.compute == plain.time.compute
    # one moment less of most parameters
    assert found.fullest.optimizer < 0.6 * plain.fullest.optimizer


def test_stages_share_the_work_and_no_cut_beats_the_bound() -> None:
    model = MemoryModel(DeepSeekV4Config.preset("flash"))
    for pipeline in (1, 2, 4):
        parallel = ParallelConfig(pipeline=pipeline, expert=32)
        layout = parallel.layout(128, model.config, 4096, 128)
        least, found = model.least_update(layout), model.update(parallel, layout, 4096)
        assert 0.7 * found.flops < least.flops <= found.flops
        assert least.entries <= found.entries
