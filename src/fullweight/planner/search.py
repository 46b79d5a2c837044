"""Which layouts of DeepSeek-V4 fit a cluster, ranked by the time of a step.

Every combination of the axes' usual sizes that the configuration accepts is a candidate. Time is cheap to ask, so
candidates are sorted by it, and memory is asked in that order until enough of them fit. Left out: stage cuts other
than by cost (`stage_layers`), and more than one row a micro-batch, which this system does not do. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import training_flops_per_token
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner.chips import Chip
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import StepTime, parts_of, step_time
from fullweight.planner.job import Job
from fullweight.planner.memory import MemoryModel, Setting, StageMemory, num_groups
from fullweight.planner.shapes import Work, work_of_v4


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


@dataclass(frozen=True)
class Candidate:
    """A layout with its time; memory once it was asked."""

    parallel: ParallelConfig
    layout: Layout
    job: Job
    time: StepTime
    memory: tuple[StageMemory, ...] = ()
    usable: int = 0

    @property
    def seconds(self) -> float:
        return self.time.total

    @property
    def fits(self) -> bool:
        return all(stage.peak <= self.usable for stage in self.memory)

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.peak)


@dataclass(frozen=True)
class Plan:
    """The fastest layouts that fit, in order, and how many were looked at."""

    request: Request
    best: tuple[Candidate, ...]
    num_legal: int
    num_asked: int  # for their memory
    smallest: Candidate | None  # of those asked, the one that needs least, when none fits


class Planner:
    """Answers about one job; keeps what its questions share."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.memory = MemoryModel(request.config)
        self.work: Work = work_of_v4(request.config, request.sequence)

    def search(self, count: int = 5) -> Plan:
        """The `count` fastest layouts that fit. Raises ConfigError when no layout is legal."""
        _check_batch(self.request)
        candidates = sorted(self.candidates(), key=lambda c: c.seconds)
        if not candidates:
            raise ConfigError(
                f"no layout of {self.request.ranks} ranks suits rows of {self.request.sequence} tokens and "
                f"{self.request.global_batch} rows a step; use {_powers(self.request)}, or rows that are a "
                f"multiple of what divides {self.request.ranks}"
            )
        best: list[Candidate] = []
        smallest: Candidate | None = None
        asked = 0
        for candidate in candidates:
            asked += 1
            known = self.with_memory(candidate)
            if known.fits:
                best.append(known)
                if len(best) == count:
                    break
            elif not best and (smallest is None or known.fullest.peak < smallest.fullest.peak):
                smallest = known
        return Plan(self.request, tuple(best), len(candidates), asked, None if best else smallest)

    def candidates(self) -> Iterator[Candidate]:
        """Every legal layout of the usual sizes, with its time."""
        request = self.request
        sizes = [n for n in (1, 2, 4, 8, 16, 32) if request.ranks % n == 0]
        for tensor, pipeline, context in product(sizes[:4], sizes, sizes[:4]):
            if pipeline * tensor * context > request.ranks:
                continue
            for schedule, virtual, reshard in _schedules(pipeline):
                for replicate, expert in product((1, 2, 4), _experts(request)):
                    shape = self._shape(
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        schedule=schedule,
                        virtual_stages=virtual,
                        reshard_after=reshard,
                        replicate=replicate,
                        expert=expert,
                    )
                    if shape is None:
                        continue
                    for recompute, offload in product(("none", "selective", "full"), (False, True)):
                        changes = {"recompute": recompute, "offload_optimizer": offload}
                        yield self.timed(shape[0].model_copy(update=changes), shape[1])

    def _shape(self, **values: Any) -> tuple[ParallelConfig, Layout] | None:
        """The layout of these axes, if it is legal."""
        dense, rest = divmod(self.request.ranks, values["pipeline"] * values["replicate"])
        if rest or dense % values["expert"] or dense % (values["tensor"] * values["context"]):
            return None
        parallel = ParallelConfig.model_validate(values)
        try:
            return parallel, self.layout(parallel)
        except ConfigError:
            return None

    def layout(self, parallel: ParallelConfig) -> Layout:
        """Raises ConfigError for what cannot be."""
        request = self.request
        return parallel.layout(request.ranks, request.config, request.sequence, request.global_batch)

    def timed(self, parallel: ParallelConfig, layout: Layout) -> Candidate:
        """The layout with the time of its step."""
        job = self.job(parallel, layout)
        return Candidate(parallel, layout, job, step_time(parts_of(job), calibration().coefficients))

    def job(self, parallel: ParallelConfig, layout: Layout) -> Job:
        request = self.request
        return Job(
            work=self.work,
            chip=request.chip,
            ranks=request.ranks,
            sequence=request.sequence,
            global_batch=request.global_batch,
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
            stage_costs=self._stage_costs(parallel),
            dispatch="plain",  # parallel/expert.py sends every choice, and its numbers are read on the host
            expert_skew=request.skew if layout.expert > 1 else 1.0,
        )

    def _stage_costs(self, parallel: ParallelConfig) -> tuple[float, ...] | None:
        if parallel.pipeline == 1:
            return None
        costs, stages, first = self.work.stage_costs, [], 0
        for count in self.memory.stages(parallel, self.request.sequence):
            stages.append(sum(costs[first : first + count]))
            first += count
        ranks = parallel.pipeline
        if parallel.schedule == "zbv":  # down the ranks and up again
            return tuple(stages[:ranks]) + tuple(reversed(stages[ranks:]))
        return tuple(stages)

    def with_memory(self, candidate: Candidate) -> Candidate:
        """The candidate with what each of its pipeline ranks holds."""
        request = self.request
        rows = request.global_batch // candidate.layout.data_size
        setting = Setting(request.sequence, rows, request.optimizer, candidate.job.expert_skew)
        stages = self.memory.of(candidate.parallel, candidate.layout, setting)
        usable = request.chip.usable_bytes(num_groups(candidate.layout))
        return replace(candidate, memory=tuple(stages), usable=usable)

    def evaluated(self, parallel: ParallelConfig) -> Candidate:
        """One layout with time and memory. Raises ConfigError for what cannot be."""
        return self.with_memory(self.timed(parallel, self.layout(parallel)))


def model_flops(request: Request) -> float:
    """Of a step: the ledger's exact count, one document as long as the row, indexer loss over selected entries."""
    per_token = training_flops_per_token(request.config, [request.sequence])
    return per_token * request.sequence * request.global_batch


def mfu(request: Request, seconds: float) -> float:
    """Model FLOPs of a step over the dense BF16 peak of all ranks."""
    return model_flops(request) / seconds / (request.chip.bf16_tflops * 1e12 * request.ranks)


def _schedules(pipeline: int) -> tuple[tuple[str, int, str], ...]:
    """(schedule, virtual stages, how long stages have their weights whole)."""
    if pipeline == 1:
        return (("1f1b", 1, "step"),)
    staged = ("interleaved", 2, "step"), ("interleaved", 4, "step"), ("zbv", 2, "step")
    return ("1f1b", 1, "step"), ("1f1b", 1, "micro_batch"), *staged


def _experts(request: Request) -> list[int]:
    experts = request.config.n_routed_experts
    return [n for n in range(1, experts + 1) if experts % n == 0 and request.ranks % n == 0]


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
