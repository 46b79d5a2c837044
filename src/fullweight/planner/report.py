"""A plan in tables and bars on a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from fullweight.planner import basis
from fullweight.planner.answer import CONVENTION, Answer, figures, interval, name_of
from fullweight.planner.explain import WORDS, unknowns
from fullweight.planner.search import Candidate, Plan, easy_batches
from fullweight.planner.topology import placements

_GIB = 2**30


def print_plan(console: Console, answer: Answer) -> None:
    """One job: layouts, memory, time, reasons, sensitivity, reliability."""
    request, plan = answer.request, answer.plan
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
    _print_layouts(console, answer)
    best = plan.best[0]
    _print_memory(console, best)
    _print_time(console, best)
    _lines(console, "placement", (f"{p.axis} {p.size}: {p.link.name}" for p in placements(best.job)))
    _lines(console, "why not", (f"{n.change}: {n.reason}" for n in answer.neighbours))
    _lines(console, f"limited by {answer.limit}; what would move it", _effects(answer))
    _print_reliability(console, answer)
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


def _print_layouts(console: Console, answer: Answer) -> None:
    plan, money = answer.plan, answer.money
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
        bill = "" if values["cost"] is None else f", cost {values['cost']:,.0f} ({_between(values, 'cost')})"
        console.print(
            f"{money.steps:,} steps: {values['hours']:,.1f} h ({_between(values, 'hours', 1)}), "
            f"{values['kwh']:,.0f} kWh ({_between(values, 'kwh')}){bill}",
            highlight=False,
        )


def _between(values: dict[str, list[float]], name: str, digits: int = 0) -> str:
    low, high = values[f"{name}_between"]
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def _print_memory(console: Console, best: Candidate) -> None:
    """Categories and the peak, then bars whose | is the limit."""
    table = Table(title="GiB by pipeline rank, each category at its worst", title_justify="left", box=None)
    table.add_column("rank")
    for name in (*best.memory[0].by_category(), "peak", "limit"):
        table.add_column(name, justify="right")
    for stage in best.memory:
        values = (*stage.by_category().values(), stage.peak, best.usable)
        table.add_row(str(stage.stage), *(f"{v / _GIB:.1f}" for v in values))
    console.print(table)
    if len(best.memory) > 1:
        bars = ((stage, "#" * min(round(50 * stage.peak / best.usable), 50)) for stage in best.memory)
        lines = (f"{s.stage:3d} {bar:50s}| {s.peak / best.usable:6.1%}" for s, bar in bars)
        _lines(console, "peak of the limit, |", lines)


def _print_time(console: Console, best: Candidate) -> None:
    lines = []
    for term in sorted(basis.terms(best.job, best.time), key=lambda term: -term.high):
        if term.high > 0.001 * best.seconds:
            bar = "#" * round(20 * term.seconds / best.seconds)
            width = "" if term.low == term.high else f"{term.low:.2f}-{term.high:.2f}"
            lines.append(
                f"{WORDS[term.name]:40s} {term.seconds:7.2f} s {term.seconds / best.seconds:6.1%} "
                f"{bar:20s} {width:>12s} {term.status:7s} {term.basis}"
            )
    _lines(console, "step time, and what each part rests on", lines)


def _effects(answer: Answer) -> Iterable[str]:
    """A bar for what each change takes off (-) or adds (+)."""
    most = max((abs(effect.change) for effect in answer.effects), default=1.0) or 1.0
    for effect in answer.effects:
        bar = ("-" if effect.change < 0 else "+") * round(20 * abs(effect.change) / most)
        yield f"{effect.change:+7.1%}  {bar:20s} {effect.what}"


def _print_reliability(console: Console, answer: Answer) -> None:
    found = answer.reliability
    dense, experts = found.dense_copies, found.expert_copies
    modes = "replica or checkpoint" if found.replica_recovery else "checkpoint alone"
    text = [
        f"an interruption every {found.hours_between:.1f} h: {found.failures_per_device_hour:.2e} a device-hour",
        f"a checkpoint every {found.checkpoint_every_seconds / 60:.0f} min ({found.checkpoint_seconds:.0f} s "
        f"each) loses least: {found.effective_share:.1%} of the time is training",
        f"recovery from {modes}: {dense} copies of dense state, {experts} of experts",
    ]
    _lines(console, "reliability", text)


def _lines(console: Console, title: str, lines: Iterable[str]) -> None:
    console.print(title, style="bold")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)


def print_comparison(console: Console, answers: Sequence[Answer]) -> None:
    """The best layout of each job side by side, with bars of time, energy and cost."""
    table = Table(box=None)
    names = ("job", "best layout", "s/step", "between", "MFU", "Mtok/s", "kWh/step", "cost/step", "headroom GiB")
    for name in names:
        table.add_column(name, justify="left" if name in ("job", "best layout") else "right")
    series: dict[str, list[tuple[str, float]]] = {"seconds a step": [], "kWh a step": [], "cost a step": []}
    for answer in answers:
        request, plan = answer.request, answer.plan
        job = f"{request.model} {request.chip.name} x{answer.num_chips}, {request.sequence}"
        if not plan.best:
            lacking = (
                "" if plan.smallest is None else f": {plan.smallest.fullest.peak / _GIB:.0f} GiB a rank at least"
            )
            table.add_row(job, f"none fits{lacking}", *[""] * 7)
            continue
        best = plan.best[0]
        low, high = interval(best)
        values = figures(request, best, answer.money)
        cost = values["cost_per_step"]
        series["seconds a step"].append((job, best.seconds))
        series["kWh a step"].append((job, values["kwh_per_step"]))
        if cost is not None:
            series["cost a step"].append((job, cost))
        table.add_row(
            job,
            name_of(best),
            f"{best.seconds:.2f}",
            f"{low:.1f}-{high:.1f}",
            f"{values['mfu']:.1%}",
            f"{values['tokens_per_second'] / 1e6:.2f}",
            f"{values['kwh_per_step']:.2f}",
            "-" if cost is None else f"{cost:.2f}",
            f"{(best.usable - best.fullest.peak) / _GIB:.1f}",
        )
    console.print(table)
    for title, values_of in series.items():
        if values_of:
            most = max(value for _, value in values_of) or 1.0
            bars = (f"{job:48s} {v:8.2f} {'#' * max(round(30 * v / most), 1)}" for job, v in values_of)
            _lines(console, title, bars)
    console.print(CONVENTION, highlight=False)
