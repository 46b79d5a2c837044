"""What the comparison of layouts does not show of pipelines: fake tensors, frozen parts, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.multi.layouts import awkward_rows
from tests.processes import fullweight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fullweight.core.types import Batch, PackedLayout
from fullweight.evidence.ledger import read
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops.reference import ReferenceOperations
from fullweight.parallel.apply import parallelize
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.mesh import Ranks
from fullweight.parallel.pipeline import PipelineEngine, divide
from fullweight.train.trainable import sharding_units

TOKENS = 128


class EvenExperts(ReferenceOperations):
    """Experts whose work does not depend on values: every token passes all of them."""

    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        hidden = self.swiglu(torch.einsum("td,xfd->txf", x, gate_up.to(x.dtype)), limit)
        share = x.new_zeros(x.shape[0], gate_up.shape[0]).scatter(1, chosen, weights.to(x.dtype))
        return torch.einsum("txf,xdf,tx->td", hidden, down.to(x.dtype), share)


def trace(arguments: list[str]) -> int:
    """A step of each role of 4 stages x 2 shards, on tensors without values, ranks that are not there."""
    config, stages, virtual = DeepSeekV4Config.preset("tiny"), 4, int(arguments[1])
    parallel = ParallelConfig(pipeline=stages // virtual, schedule=arguments[0], virtual_stages=virtual)
    rows = awkward_rows(0, TOKENS, config.vocab_size, config.ratios)
    world = 2 * parallel.pipeline
    layout = parallel.layout(world, config, TOKENS, 2 * len(rows))
    for rank in range(0, world, 2):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        ranks = Ranks(rank, world, torch.device("cpu")).laid_out(layout)
        with FakeTensorMode() as mode:
            model = DeepSeekV4(config, torch.bfloat16, ops=EvenExperts())
            division = divide(model, ranks, parallel, TOKENS)
            assert division is not None
            parallelize(model, ranks, parallel, sharding_units(model), division, whole_experts=True)
            assert ranks.stages is not None
            device = ranks.device
            engine = PipelineEngine(model, lambda m, b: m(b), division, ranks.stages, device, TOKENS)
            batches = [faked(row, mode) for row in rows]
            shares = engine.run(batches, lambda sums: torch.stack(list(sums.values())).sum(), lambda _: None)
            assert all(p.grad is not None for p in model.parameters())
        assert shares.expert_counts.shape == (5, config.n_routed_experts)
        assert ("lm" in shares.losses) == any(part.is_last for part in division.held_parts)
        dist.destroy_process_group()
    return 0


def faked(batch: Batch, mode: FakeTensorMode) -> Batch:
    def layout_of(layout: PackedLayout) -> PackedLayout:
        tables = {
            ratio: replace(table, **{k: mode.from_tensor(v) for k, v in vars(table).items() if torch.is_tensor(v)})
            for ratio, table in layout.tables.items()
        }
        positions, starts = mode.from_tensor(layout.positions), mode.from_tensor(layout.document_starts)
        return replace(layout, positions=positions, document_starts=starts, tables=tables)

    tokens, mask = mode.from_tensor(batch.tokens), mode.from_tensor(batch.loss_mask)
    return replace(batch, tokens=tokens, loss_mask=mask, layout=layout_of(batch.layout))


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), pytest.param("zbv", 2, marks=pytest.mark.slow)])
def test_a_step_needs_no_values(schedule: str, virtual: int) -> None:
    """The engine, its schedules and FSDP run on fake tensors: nothing reads a value or waits for an answer."""
    ended = fullweight(schedule, virtual, call="tests.multi.test_pipeline:trace")
    assert ended.ok, ended.output


SETTINGS = ("train.precision=fp32", "optimizer.muon.ns_dtype=float32", "optimizer.learning_rate=3e-4")
SETTINGS += (
    "eval.num_samples=0",
    "export.enabled=false",
    "train.peak_flops_per_second=1e12",
    "train.rows_per_step=4",
)


def train(output: Path, ranks: int, *settings: str) -> None:
    arguments = [a for s in (*SETTINGS, *settings) for a in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", "--output", output, *arguments, ranks=ranks)
    assert ended.ok, ended.output


def steps(run: Path) -> list[dict[str, Any]]:
    lines = list(read(run / "ledger.jsonl"))
    return [line for line in lines if line["kind"] == "step"]


def resume(run: Path, ranks: int, num_steps: int, **parallel: Any) -> None:
    """Go on to step `num_steps` under another layout."""
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["train"]["num_steps"] = num_steps
    values["parallel"] = {"pipeline": 1, "schedule": "1f1b", "virtual_stages": 1, **parallel}
    path.write_text(json.dumps(values))
    ended = fullweight("resume", run, ranks=ranks)
    assert ended.ok, ended.output


def test_a_run_moves_from_a_pipeline_to_one_rank_and_back(tmp_path: Path) -> None:
    """Two steps each on two stages, alone, and on a V of four: every number is that of an uninterrupted rank.

    Stages add nothing up in another order, but for the norm and the embedding's gradient: rounding, at most.
    """
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, 1, "train.num_steps=6", "schedule.kind=constant")
    train(moved, 2, "train.num_steps=2", "schedule.kind=constant", "parallel.pipeline=2")
    resume(moved, 1, 4)
    resume(moved, 2, 6, pipeline=2, schedule="zbv", virtual_stages=2)
    for one, other in zip(steps(whole), steps(moved), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5), one["step"]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ['["*.indexer.*"]', '["layers.2.*", "mtp.*"]', '["embed.weight"]'])
def test_frozen_stages_hand_back_what_is_needed(trainable: str, tmp_path: Path) -> None:
    """What trains may lie in any stage, beside the streams, or in the embedding alone."""
    runs = [tmp_path / "1", tmp_path / "2"]
    settings = ("train.num_steps=3", f"train.trainable={trainable}")
    train(runs[0], 1, *settings)
    train(runs[1], 2, *settings, "parallel.pipeline=2", "parallel.schedule=zbv", "parallel.virtual_stages=2")
    for one, other in zip(*map(steps, runs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["parameters"] == one["parameters"]
        assert other["without_gradient"] == one["without_gradient"]
