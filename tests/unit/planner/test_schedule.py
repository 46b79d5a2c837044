"""The planner's order of a pipeline's passes is that of torch's schedules."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from fullweight.parallel.stages import Schedule, rank_of
from fullweight.planner.schedule import actions

_KINDS = schedules._ComputationType
_NAMES = {_KINDS.SEND_F: "SF", _KINDS.RECV_F: "RF", _KINDS.SEND_B: "SB", _KINDS.RECV_B: "RB"}
_NAMES |= {_KINDS.FORWARD: "F", _KINDS.FULL_BACKWARD: "B", _KINDS.BACKWARD_INPUT: "B", _KINDS.BACKWARD_WEIGHT: "W"}
CLASSES: dict[Schedule, Any] = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", CLASSES)
def test_passes_and_exchanges_of_every_rank(schedule: Schedule, ranks: int, rounds: int) -> None:
    virtual, micro_batches = (2 if schedule == "zbv" else 3), rounds * ranks
    made = CLASSES[schedule].__new__(CLASSES[schedule])  # its arithmetic alone needs no stages
    made.pp_group_size, made.n_local_stages, made._n_microbatches = ranks, virtual, micro_batches
    made.num_stages, made.microbatches_per_round = ranks * virtual, micro_batches // rounds
    passes = {
        rank: [action for action in made._calculate_single_rank_operations(rank) if action is not None]
        for rank in range(ranks)
    }
    expected = schedules._add_send_recv(passes, lambda stage: rank_of(stage, ranks, schedule), ranks * virtual)
    found = actions(schedule, ranks, virtual, micro_batches)
    for rank in range(ranks):
        assert list(found[rank]) == [
            (_NAMES[a.computation_type], a.stage_index, a.microbatch_index) for a in expected[rank]
        ]
