"""Why a layout and not its neighbours, what would move it, and how reliable a run of it is: in words and numbers.

A neighbour differs from the best layout in one setting. It is illegal (the configuration says why), does not fit
(the stage that holds most, its largest category, and which single changes of it do fit, each counted), or is
slower (the part of the step that grew most). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
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
_ALIKE = 5e-4
"""Share of the step's time below which two layouts are as fast."""
FAILURES_PER_DEVICE_HOUR = 419 / (54 * 24 * 16384)
"""Unexpected interruptions of the Llama-3 405B run: 419 in 54 days on 16,384 H100."""


WORDS = {
    "compute": "matrix products",
    "memory_bound": "memory-bound operations",
    "launch": "launches by the host",
    "tensor": "tensor exchange",
    "context": "context exchange",
    "expert": "expert exchange",
    "data": "gathering weights and reducing gradients",
    "pipeline": "messages between stages",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "newton_schulz": "Muon's matrix products",
    "pieces": "Muon's exchange of cut matrices",
    "host": "moments to and from the host",
    "expert load": "uneven expert load",
}
"""The parts of a step for a reader."""


@dataclass(frozen=True)
class Neighbour:
    """One change of the best layout: `reason` says why it is not chosen.

    `kind`: "illegal", "does not fit", "slower", "as fast", or "faster" where a size lies outside of the search.
    Seconds of a step and bytes of the fullest rank are None for what is illegal.
    """

    change: str
    reason: str
    kind: str
    seconds: float | None = None
    peak_bytes: int | None = None
    usable_bytes: int | None = None


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
            found.append(Neighbour(change, str(error), "illegal"))
            continue
        if not other.fits:
            kind, reason = "does not fit", _memory_reason(planner, best, other)
        else:
            kind, reason = _time_reason(best, other)
        found.append(Neighbour(change, reason, kind, other.seconds, other.fullest.peak, other.usable))
    return found


def more_memory(best: Candidate, found: Sequence[Neighbour]) -> list[Effect]:
    """Neighbours that beat the best, and fit with up to twice the memory."""
    effects = []
    for one in found:
        if one.kind != "does not fit" or one.seconds is None or one.peak_bytes is None or one.usable_bytes is None:
            continue
        change, lacking = one.seconds / best.seconds - 1, one.peak_bytes - one.usable_bytes
        if change < -_ALIKE and lacking <= one.usable_bytes:
            effects.append(Effect(f"{lacking / _GIB:.1f} GiB more a rank, for {one.change}", change))
    return effects


def _changes(best: Candidate) -> Iterator[tuple[str, ParallelConfig, int]]:
    """(in words, the layout, documents in a row)."""
    parallel, documents = best.parallel, best.documents
    for change, changes in _one_setting(parallel, best.layout.dense):
        yield change, parallel.model_copy(update=changes), documents
    for number in (2 * documents, documents // 2):
        if number:
            yield f"{number} document{'s' if number > 1 else ''} in a row", parallel, number


def _one_setting(parallel: ParallelConfig, dense: int) -> Iterator[tuple[str, dict[str, object]]]:
    """(in words, what changes); experts follow where a stage or copy has fewer ranks than they are dealt over."""
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
            words = f"{axis} {other}"
            if axis in ("pipeline", "replicate") and other > size and parallel.expert > dense // 2:
                changes |= {"expert": dense // 2}
                words += f", expert {dense // 2}"
            yield words, changes
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


def _memory_reason(planner: Planner, best: Candidate, other: Candidate) -> str:
    stage = other.fullest
    category, size = max(stage.by_category().items(), key=lambda item: item[1])
    where = f"stage {stage.stage}" if other.layout.pipeline > 1 else "each rank"
    text = (
        f"{where} holds {stage.peak / _GIB:.1f} of {other.usable / _GIB:.1f} GiB; the most are {category} "
        f"({size / _GIB:.1f} GiB)"
    )
    if stage.routed_state > 0.4 * stage.peak:
        copies = other.layout.expert_shard
        text += (
            f", and {stage.routed_state / _GIB:.1f} GiB are fp32 state of routed experts, each on {copies} rank(s)"
        )
    fitting = list(islice(_fitting(planner, best, other), 3))
    return (
        f"{text}; {' or '.join(fitting)} would fit" if fitting else f"{text}; no other single change makes it fit"
    )


def _fitting(planner: Planner, best: Candidate, other: Candidate) -> Iterator[str]:
    """Single changes with which a layout fits, but for the one that leads back to the best."""
    parallel, documents = other.parallel, other.documents
    changes: list[tuple[str, dict[str, object], int]] = [
        ("moments in host memory", {"offload_optimizer": True}, documents),
        ("recompute selective", {"recompute": "selective"}, documents),
        ("recompute full", {"recompute": "full"}, documents),
        (f"expert {2 * parallel.expert}", {"expert": 2 * parallel.expert}, documents),
        (f"tensor {2 * parallel.tensor}", {"tensor": 2 * parallel.tensor}, documents),
        (f"context {2 * parallel.context}", {"context": 2 * parallel.context}, documents),
        ("weights shed each pass", {"reshard_after": "micro_batch"}, documents),
        (f"{documents // 2} in a row", {}, documents // 2),
    ]
    for words, change, number in changes:
        changed = parallel.model_copy(update=change)
        same = changed == parallel and number == documents
        if not number or same or (changed == best.parallel and number == best.documents):
            continue
        try:
            layout = planner.layout(changed, number)
        except ConfigError:
            continue
        if _fits(planner, planner.timed(changed, layout, number)):
            yield words


def _fits(planner: Planner, candidate: Candidate) -> bool:
    """Whether every rank fits, counted up to the first that does not."""
    usable = planner.usable(candidate.layout)
    return all(stage.peak <= usable for stage in planner.ranks(candidate))


def _time_reason(best: Candidate, other: Candidate) -> tuple[str, str]:
    """(kind, in words)."""
    change = other.seconds / best.seconds - 1
    before, after = asdict(best.time), asdict(other.time)
    part = max(after, key=lambda name: after[name] - before[name])
    grown = after[part] - before[part]
    if abs(change) <= _ALIKE:
        sizes = f"{other.fullest.peak / _GIB:.1f} GiB where this one holds {best.fullest.peak / _GIB:.1f}"
        return "as fast", f"as fast by the model, and holds {sizes}"
    if change < 0:
        return "faster", f"fits and is {-change:.1%} faster by the model, outside of the sizes that were searched"
    grew = f": {WORDS[part]} {before[part]:.2f} -> {after[part]:.2f} s" if grown > 0 else ""
    unknown = " (its bubble is UNKNOWN)" if other.job.overlapped_bubble else ""
    return "slower", f"{change:.1%} slower{grew}{unknown}"


def sensitivity(best: Candidate) -> list[Effect]:
    """Changes of chip, links, batch and load, largest effect first."""
    coefficients, job = calibration().coefficients, best.job
    batch = replace(job, global_batch=2 * job.global_batch)

    def seconds(changed: Job) -> float:
        return step_time(parts_of(changed), coefficients).total

    def effect(what: str, changed: Job, work: float = 1.0) -> Effect:
        return Effect(what, seconds(changed) / best.seconds / work - 1)

    parts = parts_of(job)
    products = ("gemm16", "gemm8", "gemm4", "expert16", "expert8", "expert4")
    faster = replace(parts, **{name: getattr(parts, name) / 1.1 for name in products})
    effects = [
        effect("fast links twice as fast", replace(job, chip=_links(job.chip, fast=2.0, far=1.0))),
        effect("scale-out links twice as fast", replace(job, chip=_links(job.chip, fast=1.0, far=2.0))),
        effect("memory bandwidth twice as high", replace(job, chip=_bandwidth(job.chip))),
        effect("twice the rows a step (time a row)", batch, 2.0),
        effect("expert load 1.5 times the mean", replace(job, expert_skew=1.5)),
        Effect("matrix products 10 % faster", step_time(faster, coefficients).total / best.seconds - 1),
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
    found = [f"{WORDS[term.name]}: {term.basis}" for term in terms(job, best.time) if term.status == "UNKNOWN"]
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
