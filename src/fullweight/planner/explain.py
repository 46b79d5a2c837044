"""Why a layout and not its neighbours, what would move it, and how reliable a run of it is: in words and numbers.

A neighbour differs from the best layout in one setting. It is illegal (the configuration says why), does not fit
(the stage that holds most, its largest category and what would help), or is slower (the part of the step that grew
most). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import sqrt

from fullweight.core.errors import ConfigError
from fullweight.parallel.config import ParallelConfig
from fullweight.planner.basis import terms
from fullweight.planner.chips import Chip
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import parts_of, step_time
from fullweight.planner.job import Job
from fullweight.planner.search import Candidate, Planner
from fullweight.planner.topology import placements

_GIB = 2**30
FAILURES_PER_DEVICE_HOUR = 419 / (54 * 24 * 16384)
"""Unexpected interruptions of the Llama-3 405B run: 419 in 54 days on 16,384 H100."""


@dataclass(frozen=True)
class Neighbour:
    """One change of the best layout: `reason` says why it is not chosen."""

    change: str
    reason: str


@dataclass(frozen=True)
class Effect:
    """What one change of the surroundings would do to the step time, as a share."""

    what: str
    change: float


@dataclass(frozen=True)
class Reliability:
    """Hours between interruptions and what they cost, for a stated failure rate."""

    failures_per_device_hour: float
    hours_between: float
    checkpoint_seconds: float
    restart_seconds: float
    checkpoint_every_seconds: float
    effective_share: float
    dense_copies: int
    expert_copies: int

    @property
    def replica_recovery(self) -> bool:
        """Whether a lost rank's state is held whole by another one."""
        return self.dense_copies > 1 and self.expert_copies > 1


def neighbours(planner: Planner, best: Candidate) -> list[Neighbour]:
    """Layouts one step away from `best`, and why they are not it."""
    found = []
    for change, parallel, documents in _changes(best):
        try:
            other = planner.evaluated(parallel, documents)
        except ConfigError as error:
            found.append(Neighbour(change, str(error)))
            continue
        found.append(Neighbour(change, _memory_reason(other) if not other.fits else _time_reason(best, other)))
    return found


def _changes(best: Candidate) -> Iterator[tuple[str, ParallelConfig, int]]:
    """(in words, the layout, documents in a row)."""
    parallel, documents = best.parallel, best.documents
    for change, changes in _one_setting(parallel):
        yield change, parallel.model_copy(update=changes), documents
    for number in (2 * documents, documents // 2):
        if number:
            yield f"{number} documents in a row", parallel, number


def _one_setting(parallel: ParallelConfig) -> Iterator[tuple[str, dict[str, object]]]:
    for axis in ("tensor", "pipeline", "context", "expert", "replicate"):
        size = getattr(parallel, axis)
        for other in (size * 2, size // 2):
            if other < 1:
                continue
            changes: dict[str, object] = {axis: other}
            if axis == "pipeline":
                changes |= {"stage_layers": ()}
            if axis == "pipeline" and other == 1:
                changes |= {"schedule": "1f1b", "virtual_stages": 1, "reshard_after": "step"}
            yield f"{axis} {other}", changes
    if parallel.pipeline > 1:
        yield from _other_schedules(parallel)
    for policy in ("none", "selective", "full"):
        if policy != parallel.recompute:
            yield f"recompute {policy}", {"recompute": policy}
    offload = not parallel.offload_optimizer
    name = "moments in host memory" if offload else "moments on the device"
    yield name, {"offload_optimizer": offload}


def _other_schedules(parallel: ParallelConfig) -> Iterator[tuple[str, dict[str, object]]]:
    now = (parallel.schedule, parallel.virtual_stages, parallel.reshard_after)
    virtual = max(parallel.virtual_stages, 2)
    several = [(name, v, "step") for name in ("interleaved", "zero_bubble") for v in (virtual, 2 * virtual)]
    for schedule in (("1f1b", 1, "step"), ("1f1b", 1, "micro_batch"), *several, ("zbv", 2, "step")):
        if schedule != now:
            name, number, reshard = schedule
            words = f"{name} x{number}" if number > 1 else name
            changes: dict[str, object] = {"schedule": name, "virtual_stages": number, "reshard_after": reshard}
            yield (
                words + (", weights shed each pass" if reshard == "micro_batch" else ""),
                changes | {"stage_layers": ()},
            )
    if parallel.stage_layers:
        yield "stages cut by cost", {"stage_layers": ()}


def _memory_reason(other: Candidate) -> str:
    stage = other.fullest
    category, size = max(stage.by_category().items(), key=lambda item: item[1])
    where = f"stage {stage.stage}" if other.layout.pipeline > 1 else "each rank"
    text = (
        f"{where} holds {stage.peak / _GIB:.1f} of {other.usable / _GIB:.1f} GiB; the most are {category} "
        f"({size / _GIB:.1f} GiB)"
    )
    advice = []
    if stage.routed_state > 0.4 * stage.peak:
        copies = other.layout.expert_shard
        text += (
            f", and {stage.routed_state / _GIB:.1f} GiB are fp32 state of routed experts, each on {copies} rank(s)"
        )
        advice.append("a larger expert axis")
    if category == "activations":
        advice.append("more recomputation, or more tensor or context ranks")
    if category in ("gathered", "communication"):
        advice.append("fewer layers a stage, or reshard_after micro_batch with 1f1b")
    if not other.parallel.offload_optimizer:
        advice.append("moments in host memory")
    return text + (f"; what helps: {', '.join(advice)}" if advice else "")


def _time_reason(best: Candidate, other: Candidate) -> str:
    change = other.seconds / best.seconds - 1
    before, after = asdict(best.time), asdict(other.time)
    part = max(after, key=lambda name: after[name] - before[name])
    grown = after[part] - before[part]
    if change <= 0:
        return f"fits and is {-change:.1%} faster by the model, outside of the sizes that were searched"
    words = f"{change:.1%} slower: {part.replace('_', ' ')} {before[part]:.2f} -> {after[part]:.2f} s"
    return words if grown > 0 else f"{change:.1%} slower"


def sensitivity(best: Candidate) -> list[Effect]:
    """Changes of chip, links, batch and load, largest effect first."""
    coefficients, job = calibration().coefficients, best.job
    batch = replace(job, global_batch=2 * job.global_batch)

    def seconds(changed: Job) -> float:
        return step_time(parts_of(changed), coefficients).total

    def effect(what: str, changed: Job, work: float = 1.0) -> Effect:
        return Effect(what, seconds(changed) / best.seconds / work - 1)

    faster = replace(coefficients, gemm=min(1.1 * coefficients.gemm, 1.0))
    effects = [
        effect("fast links twice as fast", replace(job, chip=_links(job.chip, fast=2.0, far=1.0))),
        effect("scale-out links twice as fast", replace(job, chip=_links(job.chip, fast=1.0, far=2.0))),
        effect("memory bandwidth twice as high", replace(job, chip=_bandwidth(job.chip))),
        effect("twice the rows a step (time a row)", batch, 2.0),
        effect("expert load 1.5 times the mean", replace(job, expert_skew=1.5)),
        Effect("matrix products 10 % faster", step_time(parts_of(job), faster).total / best.seconds - 1),
    ]
    return sorted(effects, key=lambda e: -abs(e.change))


def _links(chip: Chip, *, fast: float, far: float) -> Chip:
    last = len(chip.links) - 1
    links = tuple(
        link.model_copy(update={"bandwidth": link.bandwidth * (far if i == last else fast)})
        for i, link in enumerate(chip.links)
    )
    return chip.model_copy(update={"links": links})


def _bandwidth(chip: Chip) -> Chip:
    return chip.model_copy(update={"memory_bandwidth": 2 * chip.memory_bandwidth})


def reliability(best: Candidate, rate: float, checkpoint_seconds: float, restart_seconds: float) -> Reliability:
    """The checkpoint interval sqrt(2 C M) (Young) and the share of time that is not lost.

    Lost are C of each interval, and of each time between failures half an interval and the restart.
    """
    between = 3600 / (rate * best.layout.world)
    every = sqrt(2 * checkpoint_seconds * between)
    lost = checkpoint_seconds / every + (every / 2 + restart_seconds) / between
    layout = best.layout
    return Reliability(
        rate,
        between / 3600,
        checkpoint_seconds,
        restart_seconds,
        every,
        max(1 - lost, 0.0),
        layout.replicate,
        layout.replicate,
    )


def unknowns(best: Candidate) -> list[str]:
    """What the plan rests on without a measurement or a statement."""
    chip, job = best.job.chip, best.job
    found = [
        f"{term.name.replace('_', ' ')}: {term.basis}"
        for term in terms(job, best.time)
        if term.status == "UNKNOWN"
    ]
    used = {f"links.{chip.links.index(p.link)}." for p in placements(job)}
    found += [
        f"chip {name}: {provenance.source}"
        for name, provenance in chip.provenance.items()
        if provenance.source.startswith("assumption")
        and not name.endswith("_w")
        and (not name.startswith("links.") or any(name.startswith(link) for link in used))
    ]
    found.append("this system's own kernels on this chip: no run; efficiencies are those of published runs")
    return found
