"""A step as it passes: what each pipeline rank does when, by playing its schedule's own order.

The model of a step's time (`cost.py`) knows a pipeline's bubble as (p - 1) / (v m), and half of that for schedules
that put weight gradients off. Here the passes are put one behind the other as the schedule orders them
(`schedule.py`), each as long as its stage's share of the dearest rank's work, and a pass waits for what it needs
from other stages. So idle time comes from the order alone, and can be held beside the formula. What is exposed of
exchanges is drawn at the end of each pass. Gradients, optimizer and host follow the last pass of all ranks.

Left out: exchanges that hide behind the passes, and that ranks differ beyond their stages' work. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fullweight.parallel.stages import rank_of
from fullweight.planner.cost import PASSES
from fullweight.planner.schedule import Action, actions, one_forward_one_backward
from fullweight.planner.search import Candidate

KINDS = ("forward", "backward", "weight gradients", "passes", "exposed exchange", "optimizer", "host")
_MOST = 3000
"""Segments above which passes with no long wait between them are drawn as one: a page of more is slow to open."""


@dataclass(frozen=True)
class Segment:
    """What a pipeline rank does between two moments of the step, in seconds."""

    rank: int
    kind: str  # of KINDS; between segments the rank waits
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of every pipeline rank.

    `idle`: seconds that each rank waits before the last pass of all has ended.
    """

    segments: tuple[Segment, ...]
    idle: tuple[float, ...]
    seconds: float
    merged: bool  # passes with no long wait between them are one segment

    @property
    def idle_of_dearest(self) -> float:
        """Of the rank that waits least, which has the most work: what the formula calls the bubble."""
        return min(self.idle)


def timeline(candidate: Candidate) -> Timeline:
    """Play the candidate's step."""
    order = _order(candidate)
    passes, idle, end = _played(order, candidate)
    busy, exposed = list(passes), _exposed(candidate)
    merged, gap = 2 * len(busy) > _MOST, 0.0
    while 2 * len(busy) > _MOST:
        busy = list(_joined(passes, len(order), gap))
        gap = max(2 * gap, end / 1000)
    segments = [half for one in busy for half in _halves(one, exposed)]
    time, now = candidate.time, end
    tail = (
        ("exposed exchange", 0.0 if _gathers_in_passes(candidate) else time.data),
        ("optimizer", time.optimizer + time.newton_schulz),
        ("exposed exchange", time.pieces),
    )
    for kind, seconds in (*tail, ("host", time.host)):
        if seconds > 0:
            segments += [Segment(rank, kind, now, now + seconds) for rank in range(len(order))]
            now += seconds
    return Timeline(tuple(segments), idle, now, merged)


def _order(candidate: Candidate) -> list[list[Action]]:
    """Passes of each rank, without the messages between them."""
    parallel, ranks = candidate.parallel, candidate.layout.pipeline
    micro_batches = int(candidate.job.micro_batches)
    if parallel.virtual_stages == 1:
        return [one_forward_one_backward(ranks, rank, micro_batches) for rank in range(ranks)]
    found = actions(parallel.schedule, ranks, parallel.virtual_stages, micro_batches)
    return [[action for action in one if action[0] in "FBW"] for one in found]


def _gathers_in_passes(candidate: Candidate) -> bool:
    """Whether weights are gathered for each micro-batch, so that what shows of it lies within the passes."""
    return candidate.layout.pipeline == 1 or candidate.job.each_round


def _exposed(candidate: Candidate) -> float:
    """Share of a pass that is exposed exchange."""
    time = candidate.time
    exchange = time.tensor + time.context + time.expert + time.pipeline
    exchange += time.data if _gathers_in_passes(candidate) else 0.0
    return exchange / (exchange + time.compute + time.memory_bound + time.launch)


def _costs(candidate: Candidate) -> tuple[float, ...]:
    """Seconds of all passes of one micro-batch through each stage."""
    job, time, ranks = candidate.job, candidate.time, candidate.layout.pipeline
    costs = job.stage_costs or (1.0,) * (ranks * job.virtual)
    if candidate.parallel.schedule == "zbv":  # the job has them by rank, down and up again
        costs = (*costs[:ranks], *reversed(costs[ranks:]))
    work = (
        time.compute + time.memory_bound + time.launch + time.tensor + time.context + time.expert + time.pipeline
    )
    work += time.data if _gathers_in_passes(candidate) else 0.0
    schedule = candidate.parallel.schedule
    loads = [0.0] * ranks
    for stage, cost in enumerate(costs):
        loads[rank_of(stage, ranks, schedule)] += cost
    return tuple(work / job.micro_batches * cost / max(loads) for cost in costs)


def _played(
    order: Sequence[Sequence[Action]], candidate: Candidate
) -> tuple[list[Segment], tuple[float, ...], float]:
    """(passes, seconds that each rank waits, the end of the last pass)."""
    costs, whole = _costs(candidate), PASSES[candidate.job.recompute]
    split = any(kind == "W" for one in order for kind, _, _ in one)
    backward = whole - 2 if split else whole - 1
    shares = {"F": 1 / whole, "B": backward / whole, "W": 1 / whole}
    names = {"F": "forward", "B": "backward", "W": "weight gradients"}
    ended: dict[Action, float] = {}
    free, place, found = [0.0] * len(order), [0] * len(order), []
    while any(place[rank] < len(one) for rank, one in enumerate(order)):
        before = list(place)
        for rank, one in enumerate(order):
            while place[rank] < len(one):
                action = kind, stage, _ = one[place[rank]]
                needed = _needed(action, len(costs))
                if needed is not None and needed not in ended:
                    break
                start = max(free[rank], 0.0 if needed is None else ended[needed])
                free[rank] = ended[action] = start + costs[stage] * shares[kind]
                found.append(Segment(rank, names[kind], start, free[rank]))
                place[rank] += 1
        assert place != before, "a schedule that waits for itself"
    end = max(free)
    busy = [0.0] * len(order)
    for segment in found:
        busy[segment.rank] += segment.end - segment.start
    return found, tuple(end - seconds for seconds in busy), end


def _needed(action: Action, stages: int) -> Action | None:
    """The pass of another stage that this one waits for."""
    kind, stage, number = action
    if kind == "F" and stage > 0:
        return ("F", stage - 1, number)
    if kind == "B" and stage < stages - 1:
        return ("B", stage + 1, number)
    return None


def _joined(passes: Sequence[Segment], ranks: int, gap: float) -> Iterator[Segment]:
    """Passes of a rank with no wait between them that is longer than `gap`, as one."""
    for rank in range(ranks):
        open_: Segment | None = None
        for one in (p for p in passes if p.rank == rank):
            if open_ is not None and one.start - open_.end <= gap + 1e-9 * one.end:
                open_ = Segment(rank, "passes", open_.start, one.end)
                continue
            if open_ is not None:
                yield open_
            open_ = Segment(rank, "passes", one.start, one.end)
        if open_ is not None:
            yield open_


def _halves(one: Segment, exposed: float) -> Iterator[Segment]:
    """A pass, then what is exposed of its exchanges."""
    turn = one.end - (one.end - one.start) * exposed
    yield Segment(one.rank, one.kind, one.start, turn)
    if exposed > 0:
        yield Segment(one.rank, "exposed exchange", turn, one.end)
