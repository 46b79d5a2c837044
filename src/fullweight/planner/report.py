"""A plan in tables, and as plain data for JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from fullweight.planner import basis
from fullweight.planner.explain import neighbours, reliability, sensitivity, unknowns
from fullweight.planner.search import Candidate, Plan, Planner, Request, easy_batches, mfu
from fullweight.planner.topology import placements

_GIB = 2**30
CONVENTION = (
    "MFU: exact sparse model FLOPs of forward and backward (recomputation and padding excluded) over the dense "
    "BF16 peak of all ranks"
)


@dataclass(frozen=True)
class Money:
    """What turns a step into a run, a bill and its losses."""

    steps: int | None
    price: float | None  # of a chip for an hour
    price_kwh: float | None
    failure_rate: float
    checkpoint_seconds: float
    restart_seconds: float


def interval(candidate: Candidate) -> tuple[float, float]:
    """Seconds between which the step is expected (`basis.py`)."""
    return basis.interval(candidate.job, candidate.time)


def figures(request: Request, candidate: Candidate, money: Money) -> dict[str, float | None]:
    """Rates, energy and cost; None where a price or a number of steps was not given."""
    seconds, tokens = candidate.seconds, request.sequence * request.global_batch
    chips = request.ranks / request.chip.dies_per_chip
    kwh = request.chip.system_w * request.ranks * seconds / 3.6e6
    cost = None
    if money.price is not None or money.price_kwh is not None:
        cost = (money.price or 0) * chips * seconds / 3600 + (money.price_kwh or 0) * kwh
    steps = money.steps
    return {
        "seconds": seconds,
        "mfu": mfu(request, seconds),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds / request.ranks,
        "tokens_per_second_per_chip": tokens / seconds / chips,
        "kwh_per_step": kwh,
        "cost_per_step": cost,
        "hours": None if steps is None else steps * seconds / 3600,
        "kwh": None if steps is None else steps * kwh,
        "cost": None if steps is None or cost is None else steps * cost,
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


def describe(planner: Planner, plan: Plan, money: Money) -> dict[str, Any]:
    """Everything, as plain data."""
    request = plan.request
    return {
        "kind": "projection: nothing ran",
        "model": request.model,
        "chip": request.chip.name,
        "ranks": request.ranks,
        "sequence": request.sequence,
        "global_batch": request.global_batch,
        "convention": CONVENTION,
        "num_shapes": plan.num_shapes,
        "num_timed": plan.num_timed,
        "num_asked": plan.num_asked,
        "layouts": [
            {
                "name": name_of(candidate),
                "layout": candidate.layout.axes(),
                "parallel": candidate.parallel.model_dump(mode="json", exclude_defaults=True),
                "row_tokens": request.sequence * candidate.documents,
                "rows_per_step": request.global_batch // candidate.documents,
                "seconds_by_part": asdict(candidate.time),
                "terms": [asdict(term) for term in basis.terms(candidate.job, candidate.time)],
                "interval_seconds": interval(candidate),
                "usable_bytes": candidate.usable,
                "most_bytes": candidate.most_bytes,
                "tight": candidate.tight,
                "stages": [asdict(stage) for stage in candidate.memory],
                **figures(request, candidate, money),
            }
            for candidate in plan.best
        ],
        **(_about_best(planner, plan.best[0], money) if plan.best else {}),
    }


def _about_best(planner: Planner, best: Candidate, money: Money) -> dict[str, Any]:
    found = reliability(best, money.failure_rate, money.checkpoint_seconds, money.restart_seconds)
    return {
        "placement": [
            {"axis": p.axis, "size": p.size, "span": p.span, "link": p.link.name} for p in placements(best.job)
        ],
        "neighbours": [asdict(n) for n in neighbours(planner, best)],
        "sensitivity": [asdict(e) for e in sensitivity(best)],
        "reliability": asdict(found) | {"replica_recovery": found.replica_recovery},
        "unknown": unknowns(best),
    }


def print_plan(console: Console, planner: Planner, plan: Plan, money: Money) -> None:
    """One job: layouts, memory, time, reasons, sensitivity, reliability."""
    request = plan.request
    ranks = f"{request.ranks} {'dies' if request.chip.device == 'die' else 'GPUs'}"
    console.print(
        f"{request.model} on {ranks} of {request.chip.name}: {request.global_batch} rows of {request.sequence} "
        f"tokens a step; {plan.num_shapes:,} combinations of axes, {plan.num_timed:,} layouts timed, memory "
        f"counted for {plan.num_asked:,}",
        highlight=False,
    )
    if easier := easy_batches(request):
        console.print(
            f"few layouts divide {request.global_batch} rows; {' or '.join(map(str, easier))} rows suit more",
            highlight=False,
        )
    if not plan.best:
        _print_none(console, plan)
        return
    _print_layouts(console, plan, money)
    best = plan.best[0]
    _print_memory(console, best)
    _print_time(console, best)
    _lines(console, "placement", (f"{p.axis} {p.size}: {p.link.name}" for p in placements(best.job)))
    _lines(console, "why not", (f"{n.change}: {n.reason}" for n in neighbours(planner, best)))
    effects = sensitivity(best)
    _lines(console, "what would move it", (f"{e.change:+7.1%}  {e.what}" for e in effects))
    _print_reliability(console, best, money)
    _lines(console, "UNKNOWN", unknowns(best))
    console.print(CONVENTION, highlight=False)


def _print_none(console: Console, plan: Plan) -> None:
    console.print("no layout fits", style="red")
    if plan.smallest is not None:
        stage, usable = plan.smallest.fullest, plan.smallest.usable
        console.print(
            f"the least that is needed: {stage.peak / _GIB:.1f} of {usable / _GIB:.1f} GiB, with "
            f"{name_of(plan.smallest)}; use more chips, ones with more memory, or shorter rows",
            highlight=False,
        )


def _print_layouts(console: Console, plan: Plan, money: Money) -> None:
    table = Table(title="fastest that fit", title_justify="left", box=None)
    names = ("layout", "s/step", "between", "MFU", "tok/s/rank", "peak GiB", "kWh/step", "cost/step")
    for name in names:
        table.add_column(name, justify="left" if name == "layout" else "right")
    for candidate in plan.best:
        low, high = interval(candidate)
        values = figures(plan.request, candidate, money)
        cost = values["cost_per_step"]
        table.add_row(
            name_of(candidate),
            f"{candidate.seconds:.2f}",
            f"{low:.1f}-{high:.1f}",
            f"{values['mfu']:.1%}",
            f"{values['tokens_per_second_per_rank']:.0f}",
            f"{candidate.fullest.peak / _GIB:.1f}/{candidate.usable / _GIB:.1f}{' !' if candidate.tight else ''}",
            f"{values['kwh_per_step']:.2f}",
            "-" if cost is None else f"{cost:.2f}",
        )
    console.print(table)
    if plan.best[0].tight:
        first, chosen = plan.best[0], plan.chosen
        then = "no layout above has more room" if chosen.tight else f"--emit takes {name_of(chosen)}"
        console.print(
            f"! is tight: the count may be off, and the first may need {first.most_bytes / _GIB:.1f} of "
            f"{first.usable / _GIB:.1f} GiB. Rehearse it with them; {then}",
            highlight=False,
        )
    values = figures(plan.request, plan.best[0], money)
    if values["hours"] is not None:
        bill = "" if values["cost"] is None else f", cost {values['cost']:,.0f}"
        console.print(
            f"{money.steps} steps: {values['hours']:.1f} h, {values['kwh']:,.0f} kWh{bill}", highlight=False
        )


def _print_memory(console: Console, best: Candidate) -> None:
    table = Table(title="GiB by pipeline rank, each category at its worst", title_justify="left", box=None)
    table.add_column("rank")
    for name in (*best.memory[0].by_category(), "peak", "limit"):
        table.add_column(name, justify="right")
    for stage in best.memory:
        values = (*stage.by_category().values(), stage.peak, best.usable)
        table.add_row(str(stage.stage), *(f"{v / _GIB:.1f}" for v in values))
    console.print(table)


def _print_time(console: Console, best: Candidate) -> None:
    lines = []
    for term in sorted(basis.terms(best.job, best.time), key=lambda term: -term.high):
        if term.high > 0.001 * best.seconds:
            bar = "#" * round(20 * term.seconds / best.seconds)
            width = "" if term.low == term.high else f"{term.low:.2f}-{term.high:.2f}"
            lines.append(
                f"{term.name.replace('_', ' '):12s} {term.seconds:7.2f} s {term.seconds / best.seconds:6.1%} "
                f"{bar:20s} {width:>12s} {term.status:7s} {term.basis}"
            )
    _lines(console, "step time, and what each part rests on", lines)


def _print_reliability(console: Console, best: Candidate, money: Money) -> None:
    found = reliability(best, money.failure_rate, money.checkpoint_seconds, money.restart_seconds)
    dense, experts = found.dense_copies, found.expert_copies
    modes = "replica or checkpoint" if found.replica_recovery else "checkpoint alone"
    text = [
        f"an interruption every {found.hours_between:.1f} h: {found.failures_per_device_hour:.2e} a device-hour",
        f"a checkpoint every {found.checkpoint_every_seconds / 60:.0f} min ({found.checkpoint_seconds:.0f} s "
        f"each) loses least: {found.effective_share:.1%} of the time is training",
        f"recovery from {modes}: {dense} copies of dense state, {experts} of experts",
    ]
    _lines(console, "reliability", text)


def _lines(console: Console, title: str, lines: Any) -> None:
    console.print(title, style="bold")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)


def print_comparison(console: Console, answers: Sequence[tuple[Planner, Plan]], money: Money) -> None:
    """The best layout of each job side by side, with bars of the cost in energy."""
    table = Table(box=None)
    names = (
        "job",
        "best layout",
        "s/step",
        "between",
        "MFU",
        "Mtok/s",
        "kWh/step",
        "cost/step",
        "headroom GiB",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("job", "best layout") else "right")
    energies, times = [], []
    for _, plan in answers:
        request = plan.request
        chips = request.ranks // request.chip.dies_per_chip
        job = f"{request.model} {request.chip.name} x{chips}, {request.sequence}"
        if not plan.best:
            table.add_row(job, "none fits", *[""] * 7)
            continue
        best = plan.best[0]
        low, high = interval(best)
        values = figures(request, best, money)
        cost = values["cost_per_step"]
        energies.append((job, values["kwh_per_step"] or 0.0))
        times.append((job, best.seconds))
        table.add_row(
            job,
            name_of(best),
            f"{best.seconds:.2f}",
            f"{low:.1f}-{high:.1f}",
            f"{values['mfu']:.1%}",
            f"{(values['tokens_per_second'] or 0) / 1e6:.2f}",
            f"{values['kwh_per_step']:.2f}",
            "-" if cost is None else f"{cost:.2f}",
            f"{(best.usable - best.fullest.peak) / _GIB:.1f}",
        )
    console.print(table)
    for title, series in (("seconds a step", times), ("kWh a step", energies)):
        most = max((value for _, value in series), default=1.0)
        _lines(console, title, (f"{job:48s} {v:8.2f} {'#' * max(round(30 * v / most), 1)}" for job, v in series))
    console.print(CONVENTION, highlight=False)
