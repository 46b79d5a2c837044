"""A step as it passes: the idle time that a schedule's order gives is what its formula says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import ParallelConfig
from fullweight.planner.chips import chip
from fullweight.planner.search import Candidate, Planner, Request
from fullweight.planner.timeline import KINDS, Segment, Timeline, timeline

PLANNER = Planner(Request("flash", DeepSeekV4Config.preset("flash"), chip("ascend-910c"), 128, 4096, 512))


def candidate(*, even: bool = True, **settings: object) -> Candidate:
    """A layout of 128 dies, every stage as dear as every other if `even`."""
    parallel = ParallelConfig(expert=8, **settings)
    found = PLANNER.timed(parallel, PLANNER.layout(parallel))
    stages = parallel.pipeline * parallel.virtual_stages
    return replace(found, job=replace(found.job, stage_costs=(1.0,) * stages)) if even else found


def by_rank(played: Timeline) -> dict[int, list[Segment]]:
    found = defaultdict(list)
    for segment in played.segments:
        found[segment.rank].append(segment)
    return {rank: sorted(mine, key=lambda s: s.start) for rank, mine in found.items()}


def passes(layout: Candidate) -> float:
    """Seconds of all passes of a rank, with the messages between stages."""
    time = layout.time
    device = time.compute + time.memory_bound + time.launch + time.tensor + time.context + time.expert
    return device + time.pipeline


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_idle_time_of_even_stages_is_the_formula(schedule: str, virtual: int) -> None:
    """(p - 1) / (v m) of the work, on every rank."""
    layout = candidate(pipeline=4, schedule=schedule, virtual_stages=virtual)
    micro_batches = layout.job.micro_batches
    assert micro_batches == 16
    expected = 3 / (virtual * micro_batches) * passes(layout)
    assert timeline(layout).idle == pytest.approx([expected] * 4)


def test_weight_gradients_that_are_put_off_fill_the_bubble() -> None:
    """Where forward, backward and weight gradients take as long, a third of the wait is left, that for the first
    forward passes; the formula's half is on the safe side of it."""
    plain = timeline(candidate(pipeline=4, schedule="interleaved", virtual_stages=2)).idle_of_dearest
    for schedule in ("zero_bubble", "zbv"):
        layout = candidate(pipeline=4, schedule=schedule, virtual_stages=2)
        late = timeline(layout).idle_of_dearest
        assert late == pytest.approx(plain / 3)
        assert late < layout.time.bubble


def test_without_a_pipeline_nobody_waits_and_the_step_is_the_model_s() -> None:
    layout = candidate(even=False)
    played = timeline(layout)
    assert played.idle == (pytest.approx(0.0, abs=1e-9),)
    assert played.seconds == pytest.approx(layout.seconds)
    kinds = {s.kind for s in played.segments}
    assert {"forward", "backward", "exposed exchange", "optimizer"} <= kinds <= set(KINDS)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
def test_ranks_do_one_thing_at_a_time_and_all_of_it(schedule: str) -> None:
    """Of uneven stages too: the dearest rank's passes last as long as the model says."""
    virtual = 1 if schedule == "1f1b" else 2
    layout = candidate(even=False, pipeline=4, schedule=schedule, virtual_stages=virtual)
    played = timeline(layout)
    last_pass = played.seconds - layout.time.data - layout.time.optimizer - layout.time.host
    busy = []
    for mine in by_rank(played).values():
        for one, other in pairwise(mine):
            assert one.end <= other.start + 1e-9
        busy.append(sum(s.end - s.start for s in mine if s.end <= last_pass + 1e-9))
    assert max(busy) == pytest.approx(passes(layout))
    assert played.idle == pytest.approx([last_pass - seconds for seconds in busy])
    assert not played.merged


def test_a_step_of_very_many_passes_is_drawn_in_few() -> None:
    parallel = ParallelConfig(pipeline=16, expert=8, schedule="interleaved", virtual_stages=2)
    planner = Planner(replace(PLANNER.request, global_batch=8 * 256))
    layout = planner.timed(parallel, planner.layout(parallel))
    played = timeline(layout)
    assert played.merged
    assert len(played.segments) < 3100
    assert {s.rank for s in played.segments} == set(range(16))
    assert len(played.idle) == 16
