"""What a plan says beyond its layouts, and all of it as plain data: for JSON, the page and the terminal alike.

Each figure of a run has the interval of its step beside it: hours, energy and cost are the step's time, times
numbers that were given. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fullweight.core.errors import ConfigError
from fullweight.planner import basis
from fullweight.planner.explain import (
    WORDS,
    Effect,
    Neighbour,
    Reliability,
    more_memory,
    neighbours,
    reliability,
    sensitivity,
    unknowns,
)
from fullweight.planner.search import Candidate, Plan, Planner, Request, mfu
from fullweight.planner.timeline import timeline
from fullweight.planner.topology import placements

CONVENTION = (
    "MFU: exact sparse model FLOPs of forward and backward (recomputation and padding excluded) over the dense "
    "BF16 peak of all ranks"
)


@dataclass(frozen=True)
class Money:
    """What turns a step into a run, a bill and its losses. Raises ConfigError for what is no number."""

    steps: int | None
    price: float | None  # of a chip for an hour
    price_kwh: float | None
    failure_rate: float  # interruptions a device and hour
    checkpoint_seconds: float
    restart_seconds: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value}: expected a number; leave it out if unknown"
                )
        if self.failure_rate <= 0:
            raise ConfigError(
                "--failure-rate 0: no run is free of interruptions; give interruptions a device and hour"
            )


@dataclass(frozen=True)
class Answer:
    """A plan with what is said about its first layout, each found when it is first asked for."""

    planner: Planner
    plan: Plan
    money: Money

    @property
    def request(self) -> Request:
        return self.plan.request

    @property
    def best(self) -> Candidate:
        return self.plan.best[0]

    @property
    def num_chips(self) -> int:
        return self.request.ranks // self.request.chip.dies_per_chip

    @cached_property
    def neighbours(self) -> list[Neighbour]:
        return neighbours(self.planner, self.best)

    @cached_property
    def effects(self) -> list[Effect]:
        """What would move the step most, the largest first."""
        found = [*sensitivity(self.best), *more_memory(self.best, self.neighbours)]
        return sorted(found, key=lambda effect: -abs(effect.change))

    @cached_property
    def reliability(self) -> Reliability:
        money = self.money
        return reliability(self.best, money.failure_rate, money.checkpoint_seconds, money.restart_seconds)

    @property
    def limit(self) -> str:
        """What takes most of the step, in words."""
        part = max(basis.terms(self.best.job, self.best.time), key=lambda term: term.seconds)
        return f"{WORDS[part.name]} ({part.seconds / self.best.seconds:.0%} of the step)"


def interval(candidate: Candidate) -> tuple[float, float]:
    """Seconds between which the step is expected (`basis.py`)."""
    return basis.interval(candidate.job, candidate.time)


def figures(request: Request, candidate: Candidate, money: Money) -> dict[str, Any]:
    """Rates, energy and cost; None where a price or a number of steps was not given."""
    seconds, tokens = candidate.seconds, request.sequence * request.global_batch
    chips = request.ranks / request.chip.dies_per_chip
    kwh = request.chip.system_w * request.ranks * seconds / 3.6e6
    cost = None
    if money.price is not None or money.price_kwh is not None:
        cost = (money.price or 0) * chips * seconds / 3600 + (money.price_kwh or 0) * kwh
    steps = money.steps
    of_run = {
        "hours": None if steps is None else steps * seconds / 3600,
        "kwh": None if steps is None else steps * kwh,
        "cost": None if steps is None or cost is None else steps * cost,
    }
    shares = [end / seconds for end in interval(candidate)]
    between = {
        f"{name}_between": None if value is None else [value * share for share in shares]
        for name, value in of_run.items()
    }
    return {
        "seconds": seconds,
        "mfu": mfu(request, seconds),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds / request.ranks,
        "tokens_per_second_per_chip": tokens / seconds / chips,
        "kwh_per_step": kwh,
        "cost_per_step": cost,
        **of_run,
        **between,
    }


def name_of(candidate: Candidate) -> str:
    """The layout in a line: axes above 1 and settings."""
    parallel = candidate.parallel
    axes = " ".join(f"{axis} {size}" for axis, size in candidate.layout.axes().items())
    schedule = f" {parallel.schedule}" if parallel.pipeline > 1 else ""
    virtual = f" x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
    resharded = ", weights shed each pass" if parallel.reshard_after == "micro_batch" else ""
    offload = ", moments on the host" if parallel.offload_optimizer else ""
    cut = f", stages of {' '.join(map(str, parallel.stage_layers))} layers" if parallel.stage_layers else ""
    rows = f", {candidate.documents} documents in a row" if candidate.documents > 1 else ""
    name = f"{axes or 'one rank'}{schedule}{virtual}, recompute {parallel.recompute}"
    return f"{name}{resharded}{offload}{cut}{rows}"


def describe(answer: Answer) -> dict[str, Any]:
    """Everything, as plain data."""
    request, plan, money = answer.request, answer.plan, answer.money
    return {
        "kind": "projection: nothing ran",
        "model": request.model,
        "chip": request.chip.name,
        "chips": answer.num_chips,
        "ranks": request.ranks,
        "device": request.chip.device,
        "sequence": request.sequence,
        "document_lengths": list(request.document_lengths),
        "global_batch": request.global_batch,
        "optimizer": request.optimizer,
        "expert_skew": request.skew,
        "steps": money.steps,
        "price_per_chip_hour": money.price,
        "price_per_kwh": money.price_kwh,
        "watts_per_rank": request.chip.system_w,
        "operations": request.chip.operations,
        "convention": CONVENTION,
        "num_shapes": plan.num_shapes,
        "num_timed": plan.num_timed,
        "num_asked": plan.num_asked,
        "layouts": [_layout(request, candidate, money) for candidate in plan.best],
        "smallest": None if plan.smallest is None else _smallest(plan.smallest),
        **(_about_best(answer) if plan.best else {}),
    }


def _layout(request: Request, candidate: Candidate, money: Money) -> dict[str, Any]:
    return {
        "name": name_of(candidate),
        "layout": candidate.layout.axes(),
        "parallel": candidate.parallel.model_dump(mode="json", exclude_defaults=True),
        "row_tokens": request.sequence * candidate.documents,
        "rows_per_step": request.global_batch // candidate.documents,
        "seconds_by_part": asdict(candidate.time),
        "terms": [
            asdict(term) | {"words": WORDS[term.name]} for term in basis.terms(candidate.job, candidate.time)
        ],
        "interval_seconds": list(interval(candidate)),
        "usable_bytes": candidate.usable,
        "peak_bytes": candidate.fullest.peak,
        "most_bytes": candidate.most_bytes,
        "tight": candidate.tight,
        "stages": [asdict(stage) for stage in candidate.memory],
        **figures(request, candidate, money),
    }


def _smallest(candidate: Candidate) -> dict[str, Any]:
    return {"name": name_of(candidate), "peak_bytes": candidate.fullest.peak, "usable_bytes": candidate.usable}


def _about_best(answer: Answer) -> dict[str, Any]:
    best, found = answer.best, answer.reliability
    played = timeline(best)
    links = best.job.chip.links
    provenance = best.job.chip.provenance
    return {
        "chosen": name_of(answer.plan.chosen),
        "limit": answer.limit,
        "placement": [
            {
                "axis": p.axis,
                "size": p.size,
                "span": p.span,
                "link": p.link.name,
                "bandwidth_gb_per_second": p.link.bandwidth,
                "latency_us": p.link.latency_us,
                "status": getattr(provenance.get(f"links.{links.index(p.link)}.bandwidth"), "status", "not said"),
            }
            for p in placements(best.job)
        ],
        "timeline": asdict(played) | {"idle_of_dearest": played.idle_of_dearest},
        "neighbours": [asdict(n) for n in answer.neighbours],
        "sensitivity": [asdict(e) for e in answer.effects],
        "reliability": asdict(found) | {"replica_recovery": found.replica_recovery},
        "unknown": unknowns(best),
    }
