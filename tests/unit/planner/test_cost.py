"""The cost model keeps what must hold whatever the coefficients: more never hurts, and parts add up."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.planner.chips import Chip, chip, chip_names
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import even_cut, parts_of, step_time
from fullweight.planner.families import family_work
from fullweight.planner.job import Job
from fullweight.planner.shapes import work_of_v4
from fullweight.planner.topology import expert_routes, placements

PRO = work_of_v4(DeepSeekV4Config.preset("pro"), [4096])

jobs = st.builds(
    lambda name, tensor, pipeline, expert, data, recompute, virtual: Job(
        work=PRO,
        chip=chip(name),
        ranks=tensor * pipeline * data * 8,
        sequence=4096,
        global_batch=1024 * 16,
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        expert=expert,
        recompute=recompute,
    ),
    st.sampled_from(["ascend-910c", "h100", "gb200", "a100"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 8, 16]),
    st.sampled_from([2, 4, 16]),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from([1, 2]),
)


def seconds(job: Job) -> float:
    return step_time(parts_of(job), calibration().coefficients).total


def faster(job: Job, factor: float) -> Job:
    links = tuple(x.model_copy(update={"bandwidth": x.bandwidth * factor}) for x in job.chip.links)
    made: Chip = job.chip.model_copy(update={"links": links})
    return replace(job, chip=made)


@settings(max_examples=60, deadline=None)
@given(jobs, st.floats(1.0, 8.0))
def test_faster_links_never_slow(job: Job, factor: float) -> None:
    assert seconds(faster(job, factor)) <= seconds(job) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_more_chips_never_lengthen_the_ideal_compute(job: Job) -> None:
    more = replace(job, ranks=2 * job.ranks)
    assert step_time(parts_of(more), calibration().coefficients).compute <= step_time(
        parts_of(job), calibration().coefficients
    ).compute * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_parts_add_up_and_are_not_negative(job: Job) -> None:
    time = asdict(step_time(parts_of(job), calibration().coefficients))
    assert all(value >= -1e-9 for value in time.values())
    assert sum(time.values()) == pytest.approx(seconds(job))


def test_the_bubble_is_that_of_the_schedule() -> None:
    """(p - 1) / (v m) of the work: hand-counted for 8 stages, 2 virtual, 32 micro-batches."""
    job = Job(PRO, chip("ascend-910c"), 512, 4096, 1024, tensor=2, pipeline=8, virtual=2, expert=64)
    assert job.micro_batches == 32
    assert parts_of(job).bubble == pytest.approx(7 / 64)


def test_axes_are_placed_on_links() -> None:
    job = Job(PRO, chip("ascend-910c"), 1536, 4096, 1536, tensor=2, pipeline=2, expert=64)
    assert {p.axis: p.link.name for p in placements(job)} == {
        "tensor": "twin die",
        "expert": "supernode",
        "data": "supernode",
        "pipeline": "scale-out",
    }


def test_expert_exchange_goes_once_to_each_group() -> None:
    near, far = expert_routes(chip("h100"), 8, 8)
    assert far == 0
    assert 0 < near < 7
    near, far = expert_routes(chip("h100"), 64, 6)
    assert far == pytest.approx(8 * (1 - (7 / 8) ** 6) * 7 / 8)  # of 8 nodes, one's own left out


def test_a_plain_exchange_sends_a_copy_for_each_expert() -> None:
    """6 choices over 64 ranks, 8 to a node: 7/64 of them go to near ranks and 56/64 to far ones."""
    assert expert_routes(chip("h100"), 64, 6, grouped=False) == pytest.approx((6 * 7 / 64, 6 * 56 / 64))


def test_the_best_cut_of_layers_by_hand() -> None:
    """Five layers in two runs: 3 + 1 and 2 + 2 + 1 is best of all cuts in order."""
    assert even_cut((3.0, 1.0, 2.0, 2.0, 1.0), 2) == pytest.approx((4.0, 5.0))
    assert even_cut((1.0, 1.0), 4) == pytest.approx((1.0, 1.0, 0.0, 0.0))


def test_a_host_that_waits_adds_its_time() -> None:
    """Otherwise the slower of host and device sets the pace, so that less is added."""
    fused = Job(PRO, chip("h100"), 512, 4096, 1024, tensor=1, pipeline=8, expert=64)
    plain = replace(fused, dispatch="plain")
    coefficients = calibration().coefficients
    waits = step_time(parts_of(plain), coefficients).launch
    assert waits == pytest.approx(parts_of(plain).host_passes * coefficients.host_ms * 1e-3)
    assert step_time(parts_of(fused), coefficients).launch < waits
    assert step_time(parts_of(replace(fused, graphed=2)), coefficients).launch == 0


def test_a_chip_with_too_few_watts_is_slower() -> None:
    starved = chip("gb200").model_copy(update={"power_w": 600.0})
    jobs = [Job(PRO, c, 256, 4096, 1024, expert=64) for c in (chip("gb200"), starved)]
    fast, slow = (step_time(parts_of(job), calibration().coefficients).compute for job in jobs)
    assert slow > 1.5 * fast


@pytest.mark.parametrize("name", chip_names())
def test_every_chip_gives_a_time(name: str) -> None:
    assert seconds(Job(family_work("llama3-8b", 4096), chip(name), 64, 4096, 64)) > 0
