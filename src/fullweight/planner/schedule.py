"""What a pipeline's rank does in order: the schedules of torch.distributed.pipelining, without torch.

An action is (kind, stage, micro-batch): "F" forward, "B" backward, "W" the weight gradients that a zero-bubble
schedule puts off, "RF" and "RB" requests of what a forward or backward pass waits for, "SF" and "SB" sends.
Source: `pipelining/schedules.py` of torch 2.13 (1F1B; interleaved; zero bubble; its V).
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

from fullweight.parallel.stages import Schedule, rank_of

Action = tuple[str, int, int]


@cache
def actions(schedule: Schedule, ranks: int, virtual: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """Of each rank, with several stages on a rank."""
    if schedule == "zbv":
        passes = [_v_shaped(ranks, rank, micro_batches) for rank in range(ranks)]
    else:
        passes = [_interleaved(schedule, ranks, virtual, micro_batches, rank) for rank in range(ranks)]
    return _with_exchanges(passes, schedule, ranks, ranks * virtual)


def _interleaved(schedule: Schedule, ranks: int, virtual: int, micro_batches: int, rank: int) -> list[Action]:
    """Rounds of micro-batches through all stages, then one backward pass for each forward one."""
    late = schedule == "zero_bubble"
    each = micro_batches // max(1, micro_batches // ranks)
    total = virtual * micro_batches
    warm_up = min((virtual - 1) * each + (1 if late else 2) * (ranks - 1 - rank), total)

    def stage_of(step: int, forward: bool) -> int:
        local = step // each % virtual if forward else virtual - 1 - (step - warm_up) // each % virtual
        return local * ranks + rank

    counts: dict[tuple[str, int], int] = defaultdict(int)
    found: list[Action] = []
    backward: list[int] = []

    def add(kind: str, stage: int) -> None:
        found.append((kind, stage, counts[kind, stage]))
        counts[kind, stage] += 1

    for step in range(total + warm_up):
        if step < total:
            add("F", stage_of(step, forward=True))
        if step >= warm_up:
            backward.append(stage_of(step, forward=False))
            add("B", backward[-1])
            if late and step - warm_up >= rank:
                add("W", backward[counts["weights", 0]])
                counts["weights", 0] += 1
    for stage in backward[counts["weights", 0] :] if late else ():
        add("W", stage)
    return found


def _v_shaped(ranks: int, rank: int, micro_batches: int) -> list[Action]:
    """Two stages on each rank, down and up again."""
    number = max(2 * ranks - 1, micro_batches)
    stages = rank, 2 * ranks - 1 - rank
    counts: dict[tuple[str, int], int] = defaultdict(int)
    found: list[Action] = []

    def add(*kinds: tuple[str, int]) -> None:
        for kind, which in kinds:
            if counts[kind, which] < micro_batches:
                found.append((kind, stages[which], counts[kind, which]))
            counts[kind, which] += 1

    add(*[("F", 0)] * (2 * (ranks - rank) - 1))
    for _ in range(rank):
        add(("F", 1), ("F", 0))
    for _ in range(ranks - rank):
        add(("F", 1), ("B", 1), ("W", 1))
    while counts["F", 1] < counts["F", 0] or counts["F", 0] < number:
        if counts["F", 0] < number:
            add(("F", 0))
        add(("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1))
    for _ in range(rank):
        add(("B", 0), ("B", 1))
    for _ in range(ranks - rank):
        add(("B", 0), ("W", 0))
    for which in (1, 0):
        while counts["W", which] < counts["B", which]:
            add(("W", which))
    return found


def _with_exchanges(
    passes: list[list[Action]], schedule: Schedule, ranks: int, num_stages: int
) -> tuple[tuple[Action, ...], ...]:
    """Requests stand where the sender's pass has run, sends behind the pass."""

    def home(stage: int) -> int:
        return rank_of(stage, ranks, schedule)

    found: list[list[Action]] = [[] for _ in passes]
    known: list[set[Action]] = [set() for _ in passes]
    place = [0] * ranks

    def ready(rank: int, action: Action) -> bool:
        kind, stage, number = action
        if kind == "F" and stage > 0:
            return bool(known[rank] & {("RF", stage, number), ("F", stage - 1, number)})
        if kind == "B" and stage < num_stages - 1:
            return bool(known[rank] & {("RB", stage, number), ("B", stage + 1, number)})
        return True

    def put(rank: int, action: Action) -> None:
        found[rank].append(action)
        known[rank].add(action)

    while any(place[rank] < len(passes[rank]) for rank in range(ranks)):
        for rank in range(ranks):
            if place[rank] == len(passes[rank]) or not ready(rank, passes[rank][place[rank]]):
                continue
            kind, stage, number = action = passes[rank][place[rank]]
            place[rank] += 1
            put(rank, action)
            to = stage + 1 if kind == "F" else stage - 1
            if kind in "FB" and 0 <= to < num_stages and home(to) != rank:
                put(rank, (f"S{kind}", stage, number))
                put(home(to), (f"R{kind}", to, number))
    return tuple(tuple(one) for one in found)


def one_forward_one_backward(ranks: int, rank: int, micro_batches: int) -> list[Action]:
    """Of one stage on each rank: as many forward passes as there are ranks from here, then one for one."""
    ahead = min(ranks - rank, micro_batches)
    found: list[Action] = [("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        found.append(("B", rank, number))
        if number + ahead < micro_batches:
            found.append(("F", rank, number + ahead))
    return found
