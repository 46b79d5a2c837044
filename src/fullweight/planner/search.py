"""Which layouts of DeepSeek-V4 fit a cluster, ranked by the time of a step.

The space is in `space.py`: axes, documents in a row, schedules, what is recomputed or offloaded, cuts of stages.
It is searched from the fastest on: a combination of axes enters a queue with a time that none of its layouts can
beat, is opened when it is first in the queue, and its layouts enter with their own times; memory is asked of a
layout that is first. So the first that fit are the fastest of the whole space, and most of it is never opened. A
layout whose dearest rank is a little too full gives a layer to the emptiest rank and queues again, with its longer
time. Combinations whose smallest layout is far too large are dropped whole.

Left out: sizes that the space does not have, and schedules that this system does not run. Imports no torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count as numbers

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import training_flops_per_token
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner import space
from fullweight.planner.chips import Chip
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import StepTime, parts_of, step_time
from fullweight.planner.job import Job
from fullweight.planner.memory import MemoryModel, Setting, StageMemory, num_groups
from fullweight.planner.screen import CLOSE, SMALL, Screen
from fullweight.planner.shapes import Work, work_of_v4

MORE = 0.01
"""How much more than the count a rank may need. Operations of the chip's maker are counted; peaks of recorded
rehearsals with them are at most 0.2 % higher for Flash and Pro, 1.5 % for tiny models
(`tests/unit/planner/test_memory.py`).
"""


@dataclass(frozen=True)
class Request:
    """A job to plan."""

    model: str
    config: DeepSeekV4Config
    chip: Chip
    ranks: int
    sequence: int
    global_batch: int  # rows of a step
    optimizer: str = "adamw"
    skew: float = 1.0  # load of the fullest expert rank over the mean
    capacity: float | None = None  # most that an expert takes of a row, in even shares
    lengths: tuple[int, ...] = ()  # of the documents that fill the rows; none: one as long as a row

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return self.lengths or (self.sequence,)


@dataclass(frozen=True)
class Candidate:
    """A layout with its time; memory once it was asked."""

    parallel: ParallelConfig
    layout: Layout
    job: Job
    time: StepTime
    documents: int = 1  # of the request's length, in a row
    memory: tuple[StageMemory, ...] = ()
    usable: int = 0

    @cached_property
    def seconds(self) -> float:
        return self.time.total

    @property
    def fits(self) -> bool:
        return all(stage.peak <= self.usable for stage in self.memory)

    @property
    def most_bytes(self) -> int:
        """What the fullest rank may need with the operations that its chip runs."""
        return int(self.fullest.peak * (1 + MORE))

    @property
    def tight(self) -> bool:
        """Whether what is left is less than how far off the count may be."""
        return self.most_bytes > self.usable

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.peak)


@dataclass(frozen=True)
class Plan:
    """The fastest layouts that fit, in order, and how much was looked at."""

    request: Request
    best: tuple[Candidate, ...]
    num_shapes: int  # legal combinations of axes and documents in a row
    num_timed: int
    num_asked: int  # for their memory
    smallest: Candidate | None  # of those asked, the one that needs least, when none fits

    @property
    def chosen(self) -> Candidate:
        """The fastest that is not tight, of those found; the fastest where all are."""
        return next((c for c in self.best if not c.tight), self.best[0])


class Planner:
    """Answers about one job; keeps what its questions share."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.memory = MemoryModel(request.config)
        self._screen = Screen(self.memory)
        self.work: Work = work_of_v4(request.config, request.document_lengths)
        self._costs: dict[tuple[object, ...], tuple[float, ...]] = {}

    def search(self, count: int = 5) -> Plan:
        """The `count` fastest layouts that fit. Raises ConfigError when no layout is legal."""
        _check_batch(self.request)
        queue = _Queue(self)
        if not queue.num_shapes:
            raise ConfigError(
                f"no layout of {self.request.ranks} ranks suits rows of {self.request.sequence} tokens and "
                f"{self.request.global_batch} rows a step; use {_powers(self.request)}, or rows that are a "
                f"multiple of what divides {self.request.ranks}"
            )
        best: list[Candidate] = []
        while len(best) < count and (found := queue.next_that_fits()) is not None:
            best.append(found)
        smallest = None if best else queue.smallest
        return Plan(self.request, tuple(best), queue.num_shapes, queue.num_timed, queue.num_asked, smallest)

    def parallel(self, shape: space.Shape, schedule: space.Schedule = ("1f1b", 1, "step")) -> ParallelConfig:
        """A layout of the space with what the request fixes."""
        found = space.parallel(shape, schedule)
        capacity = self.request.capacity
        return found if capacity is None else found.model_copy(update={"expert_capacity_factor": capacity})

    def layout(self, parallel: ParallelConfig, documents: int = 1) -> Layout:
        """Raises ConfigError for what cannot be."""
        request = self.request
        if request.global_batch % documents:
            raise ConfigError(
                f"{request.global_batch} documents a step do not fill rows of {documents}; use a divisor of it"
            )
        row_tokens, rows = request.sequence * documents, request.global_batch // documents
        return parallel.layout(request.ranks, request.config, row_tokens, rows)

    def timed(self, parallel: ParallelConfig, layout: Layout, documents: int = 1) -> Candidate:
        """The layout with the time of its step."""
        job = self.job(parallel, layout, documents)
        if self.request.optimizer == "muon":
            row_tokens = self.request.sequence * documents
            job = replace(job, muon=self.memory.update(parallel, layout, row_tokens))
        time = step_time(parts_of(job), calibration().coefficients)
        return Candidate(parallel, layout, job, time, documents)

    def bound(self, shape: space.Shape, layout: Layout) -> float:
        """Seconds that no layout of this shape can beat: all it could save is saved at once."""
        virtual = max(v for _, v, _ in space.schedules(shape.pipeline, self.request.config.num_hidden_layers))
        job = self.job(self.parallel(shape), layout, shape.documents)
        muon = self.memory.least_update(layout) if self.request.optimizer == "muon" else None
        costs = (1.0,) * shape.pipeline
        even = replace(job, virtual=virtual, overlapped_bubble=True, stage_costs=costs, muon=muon)
        parts = parts_of(even)
        return step_time(replace(parts, pipeline=parts.pipeline / virtual), calibration().coefficients).total

    def job(self, parallel: ParallelConfig, layout: Layout, documents: int = 1) -> Job:
        """All but what Muon does."""
        request = self.request
        return Job(
            work=self.work,
            chip=request.chip,
            ranks=request.ranks,
            sequence=request.sequence,
            global_batch=request.global_batch,
            micro_batch=documents,
            tensor=layout.tensor,
            context=layout.context,
            pipeline=layout.pipeline,
            virtual=parallel.virtual_stages,
            expert=layout.expert,
            replicate=layout.replicate,
            shard_parameters=True,
            each_round=parallel.reshard_after == "micro_batch",
            offload=parallel.offload_optimizer,
            recompute=parallel.recompute,
            overlapped_bubble=parallel.schedule in {"zero_bubble", "zbv"},
            stage_costs=self._stage_costs(parallel, request.sequence * documents),
            dispatch="plain",  # parallel/expert.py sends every choice, and its numbers are read on the host
            expert_skew=request.skew if layout.expert > 1 else 1.0,
            expert_capacity=parallel.expert_capacity_factor,
        )

    def _stage_costs(self, parallel: ParallelConfig, row_tokens: int) -> tuple[float, ...] | None:
        if parallel.pipeline == 1:
            return None
        counts = self.memory.stages(parallel, row_tokens)
        key = (parallel.pipeline, parallel.schedule == "zbv", counts)
        if key not in self._costs:
            costs, stages, first = self.work.stage_costs, [], 0
            for number in counts:
                stages.append(sum(costs[first : first + number]))
                first += number
            if parallel.schedule == "zbv":  # down the ranks and up again
                stages[parallel.pipeline :] = reversed(stages[parallel.pipeline :])
            self._costs[key] = tuple(stages)
        return self._costs[key]

    def with_memory(self, candidate: Candidate) -> Candidate:
        """The candidate with what each of its pipeline ranks holds."""
        return replace(candidate, memory=tuple(self.ranks(candidate)), usable=self.usable(candidate.layout))

    def ranks(self, candidate: Candidate) -> Iterator[StageMemory]:
        """Memory of its pipeline ranks, in order, each counted when it is asked for."""
        return self.memory.of(candidate.parallel, candidate.layout, self.setting(candidate))

    def rank(self, candidate: Candidate, rank: int) -> StageMemory:
        """Memory of one of them."""
        return self.memory.rank(candidate.parallel, candidate.layout, self.setting(candidate), rank)

    def screened(self, candidate: Candidate) -> Iterator[StageMemory]:
        """A quick look at the same, if the model is not small."""
        if self.request.config.hidden_size < SMALL:
            return self.ranks(candidate)
        return self._screen.ranks(candidate.parallel, candidate.layout, self.setting(candidate))

    def setting(self, candidate: Candidate) -> Setting:
        """What decides memory beside model and layout."""
        request, documents = self.request, candidate.documents
        rows = request.global_batch // documents // candidate.layout.data_size
        job, operations = candidate.job, request.chip.operations
        capacity = job.expert_capacity if job.expert > 1 else None  # all rows of the row's experts are here else
        row_tokens = request.sequence * documents
        return Setting(row_tokens, rows, request.optimizer, job.expert_skew, operations, capacity)

    def usable(self, layout: Layout) -> int:
        """Bytes of a rank that its process groups leave."""
        return self.request.chip.usable_bytes(num_groups(layout))

    def evaluated(self, parallel: ParallelConfig, documents: int = 1) -> Candidate:
        """One layout with time and memory. Raises ConfigError for what cannot be."""
        return self.with_memory(self.timed(parallel, self.layout(parallel, documents), documents))


_MOVES = 3
_A_LITTLE = 1.2
"""Layers that may move to another stage, and how far above the limit a rank may be for that to be tried."""


class _Queue:
    """The space of one job, from the fastest on: shapes by their bounds, layouts by their times."""

    def __init__(self, planner: Planner) -> None:
        self._planner, self._numbers = planner, numbers()
        self._heap: list[tuple[float, int, Callable[[], Candidate | None]]] = []
        self._layers = planner.request.config.num_hidden_layers
        self.num_shapes = self.num_timed = self.num_asked = 0
        self._least: tuple[float, Candidate | None] = (math.inf, None)
        self._too_long: dict[tuple[int, ...], int] = {}
        for shape in space.shapes(planner.request.ranks, planner.request.config, planner.request.sequence):
            try:
                layout = planner.layout(planner.parallel(shape), shape.documents)
            except ConfigError:
                continue
            self.num_shapes += 1
            self._push(planner.bound(shape, layout), partial(self._open, shape, layout))

    def next_that_fits(self) -> Candidate | None:
        """The fastest layout that fits and was not given yet; None when there is none left."""
        while self._heap:
            if (found := heapq.heappop(self._heap)[2]()) is not None:
                return found
        return None

    def _push(self, seconds: float, then: Callable[[], Candidate | None]) -> None:
        heapq.heappush(self._heap, (seconds, next(self._numbers), then))

    def _asked(self, candidate: Candidate) -> Candidate | None:
        """The candidate with its memory at a quick look; None where a rank is far too full, which ends it."""
        self.num_asked += 1
        usable, stages = self._planner.usable(candidate.layout), []
        for stage in self._planner.screened(candidate):
            stages.append(stage)
            if stage.peak > _A_LITTLE * usable:
                break
        most = max(stage.peak for stage in stages)
        if most > usable and most < self._least[0]:
            self._least = (most, candidate)
        if most > _A_LITTLE * usable:
            return None
        return replace(candidate, memory=tuple(stages), usable=usable)

    @property
    def smallest(self) -> Candidate | None:
        """Of the layouts that do not fit, the one that needs least, as far as they were counted."""
        return None if self._least[1] is None else self._planner.with_memory(self._least[1])

    def _timed(self, parallel: ParallelConfig, layout: Layout, documents: int) -> Candidate:
        self.num_timed += 1
        return self._planner.timed(parallel, layout, documents)

    def _open(self, shape: space.Shape, layout: Layout) -> None:
        """Queue every schedule of a shape by its fastest layout, unless the smallest of all is far too large."""
        base = self._planner.parallel(shape)
        if shape.pipeline > 1:
            base = base.model_copy(update={"reshard_after": "micro_batch"})
        if shape.documents >= self._too_long.get(shape[:-1], math.inf):  # fewer in a row did not fit either
            return
        if self._asked(self._timed(space.smallest(base), layout, shape.documents)) is None:
            self._too_long[shape[:-1]] = min(shape.documents, self._too_long.get(shape[:-1], shape.documents))
            return
        rows = self._planner.request.global_batch // shape.documents // layout.data_size
        for schedule in space.schedules(shape.pipeline, self._layers):
            if space.legal(schedule, shape.pipeline, rows):
                fastest = self._timed(self._planner.parallel(shape, schedule), layout, shape.documents)
                self._push(fastest.seconds, partial(self._open_schedule, fastest))

    def _open_schedule(self, fastest: Candidate) -> None:
        """Queue what is recomputed or offloaded with one schedule, unless the smallest layout is far too large."""
        smallest = self._timed(space.smallest(fastest.parallel), fastest.layout, fastest.documents)
        if self._asked(smallest) is not None:
            between = space.policies(fastest.parallel)[1:-1]
            layouts = [self._timed(p, fastest.layout, fastest.documents) for p in between]
            for candidate in (fastest, *layouts, smallest):
                self._push(candidate.seconds, partial(self._ask, candidate, 0))

    def _ask(self, candidate: Candidate, moves: int) -> Candidate | None:
        """The layout if it fits; else one with a layer moved is queued."""
        known = self._asked(candidate)
        if known is None:
            return None
        if known.fullest.peak <= CLOSE * known.usable:
            counted = self._counted(known)
            if counted is not None:
                return counted
        self._move_a_layer(known, moves)
        return None

    def _counted(self, known: Candidate) -> Candidate | None:
        """With every rank's memory, the fullest at a quick look first; None where one is too full."""
        ranks, found = sorted(range(len(known.memory)), key=lambda r: -known.memory[r].peak), {}
        for rank in ranks:
            found[rank] = self._planner.rank(known, rank)
            if found[rank].peak > known.usable:
                return None
        return replace(known, memory=tuple(found[rank] for rank in sorted(found)))

    def _move_a_layer(self, known: Candidate, moves: int) -> None:
        """Queue the layout with a layer moved from the fullest rank to the emptiest, if that may help."""
        parallel, peaks = known.parallel, [stage.peak for stage in known.memory]
        if parallel.pipeline == 1 or moves == _MOVES or sum(peaks) / len(peaks) > known.usable:
            return
        row_tokens = self._planner.request.sequence * known.documents
        moved = space.with_a_layer_moved(
            parallel,
            self._planner.memory.stages(parallel, row_tokens),
            peaks.index(max(peaks)),
            peaks.index(min(peaks)),
        )
        if moved is not None:
            candidate = self._timed(moved, known.layout, known.documents)
            self._push(candidate.seconds, partial(self._ask, candidate, moves + 1))


def model_flops(request: Request) -> float:
    """Of a step: the ledger's exact count of the request's documents, indexer loss over selected entries."""
    per_token = training_flops_per_token(request.config, request.document_lengths)
    return per_token * request.sequence * request.global_batch


def mfu(request: Request, seconds: float) -> float:
    """Model FLOPs of a step over the dense BF16 peak of all ranks."""
    return model_flops(request) / seconds / (request.chip.bf16_tflops * 1e12 * request.ranks)


def _powers(request: Request) -> str:
    """Numbers of chips on both sides of what was asked that every axis divides."""
    below = 2 ** (request.ranks.bit_length() - 1)
    chips = [n // request.chip.dies_per_chip for n in (below, 2 * below)]
    return " or ".join(f"{n} chips" for n in chips if n)


def easy_batches(request: Request) -> tuple[int, ...]:
    """Rows a step on both sides that far more layouts divide; empty when those asked for are such."""
    step = 16 if request.ranks >= 64 else 4
    below = request.global_batch // step * step
    return () if below == request.global_batch else tuple(n for n in (below, below + step) if n)


def _check_batch(request: Request) -> None:
    """Some divisor of the batch has to be the number of data ranks of a layout."""
    most = max(request.config.num_hidden_layers, 1) * 8 * 8
    legal = [n for n in range(1, request.ranks + 1) if request.ranks % n == 0 and request.ranks // n <= most]
    if not any(request.global_batch % n == 0 for n in legal):
        least = min(legal)
        below = request.global_batch // least * least
        nearest = [n for n in (below, below + least) if n]
        raise ConfigError(
            f"--global-batch {request.global_batch} is not divisible by the data ranks of any layout of "
            f"{request.ranks} ranks (at least {least}); use {' or '.join(map(str, nearest))}"
        )
