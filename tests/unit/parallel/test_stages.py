"""Cuts and places of a pipeline, against brute force and torch's own mapping."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from fullweight.models.deepseek_v4.config import PRESETS, DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import forward_flops, layer_flops
from fullweight.parallel.pipeline import _MULTI
from fullweight.parallel.stages import (
    Schedule,
    balanced_layers,
    cut,
    legal_micro_batches,
    rank_of,
    stages_of,
)


def test_no_other_cut_has_a_cheaper_dearest_part() -> None:
    """All ways to cut up to nine layers of random costs."""
    draw = random.Random(1)
    for _ in range(200):
        costs = [draw.randint(1, 9) for _ in range(draw.randint(1, 9))]
        parts = draw.randint(1, len(costs))
        found = cut(costs, parts)
        assert len(found) == parts
        assert sum(found) == len(costs)
        assert min(found) > 0
        ends = [sum(found[:i]) for i in range(parts + 1)]
        dearest = max(sum(costs[a:b]) for a, b in pairwise(ends))
        every = combinations(range(1, len(costs)), parts - 1)
        ways = ([0, *places, len(costs)] for places in every)
        assert dearest == min(max(sum(costs[a:b]) for a, b in pairwise(way)) for way in ways)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("lengths", [[4096], [3, 130, 1000]])
def test_layers_and_the_rest_cost_what_the_model_costs(name: str, lengths: list[int]) -> None:
    """The sum over layers, head and MTP is the closed form of the whole."""
    config = DeepSeekV4Config.preset(name)
    layers, rest = layer_flops(config, lengths)
    assert len(layers) == config.num_hidden_layers
    assert sum(layers) + rest == forward_flops(config, lengths).total
    kinds = {}
    for layer, cost in enumerate(layers):
        assert kinds.setdefault(config.compress_ratios[layer], cost) == cost


def test_the_stage_of_head_and_mtp_has_fewer_layers() -> None:
    """V4-Pro on eight stages: 61 layers, and behind the last one about two layers' worth of head and MTP."""
    config = DeepSeekV4Config.preset("pro")
    counts = balanced_layers(config, 8, 4096)
    assert sum(counts) == 61
    assert counts[-1] < min(counts[:-1])
    assert max(counts) <= 8


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
def test_torch_orders_what_is_legal(schedule: Schedule, ranks: int) -> None:
    """What is called legal is what torch's schedules take; they place all sends and receives when made."""
    virtual = 1 if schedule == "1f1b" else 2
    for count in range(ranks, 3 * ranks + 2):
        stages = [
            SimpleNamespace(
                stage_index=index,
                num_stages=ranks * virtual,
                group_size=ranks,
                group_rank=0,
                submod=None,
                is_last=index == ranks * virtual - 1,
                stage_index_to_group_rank={},
            )
            for index in stages_of(0, ranks, ranks * virtual, schedule)
        ]
        kind: Any = Schedule1F1B if schedule == "1f1b" else _MULTI[schedule]
        if legal_micro_batches(schedule, ranks, count):
            kind(stages[0] if schedule == "1f1b" else stages, count)
        else:
            with pytest.raises(ValueError, match="multiple of the number of rounds"):
                kind(stages, count)
    assert not any(legal_micro_batches(schedule, ranks, count) for count in range(ranks))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_places_are_those_that_torch_expects(ranks: int) -> None:
    """Stage to rank, dealt out in turn or as a V, is what the schedules of torch assume."""
    for schedule, style, virtual in (("interleaved", "loop", 3), ("zero_bubble", "loop", 2), ("zbv", "v", 2)):
        stages = ranks * virtual
        expected = generate_stage_to_rank_mapping(ranks, stages, style=style)
        assert {s: rank_of(s, ranks, schedule) for s in range(stages)} == expected
        held = [stages_of(rank, ranks, stages, schedule) for rank in range(ranks)]
        assert sorted(stage for each in held for stage in each) == list(range(stages))
        assert all(len(each) == virtual for each in held)
