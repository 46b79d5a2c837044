"""A plan as one page that needs no network: the answer first, then what it rests on and why not another.

Everything is made from what `answer.describe` gives, which the page also holds as JSON, so that it says what
`--json` says. Style and figures are those of the other pages (`report/`). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fullweight.planner import pictures
from fullweight.report import page
from fullweight.report.drawing import drawn

_TEMPLATE = Path(__file__).parent / "templates" / "plan.html"
_GIB = 2**30


def write_page(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of one plan, or of several with what sets them apart first."""
    several = len(plans) > 1
    any_fits = any(plan["layouts"] for plan in plans)
    page.write_page(
        path,
        _TEMPLATE,
        title=f"Plans of {len(plans)} jobs" if several else f"Plan: {pictures.job(plans[0])}",
        sections=[
            {
                "plan": plan,
                "name": pictures.job(plan),
                "verdict": verdict(plan),
                "tiles": tiles(plan) if plan["layouts"] else [],
                "money": _money(plan) if plan["layouts"] else [],
                "reliability": _reliability(plan) if plan["layouts"] else [],
                "figures": _figures(plan, f"plan{number}") if plan["layouts"] else {},
            }
            for number, plan in enumerate(plans)
        ],
        beside=beside(plans) if several else [],
        compared=beside_in_words(plans) if several else [],
        side_by_side=drawn(pictures.side_by_side(plans), "all") if several and any_fits else "",
        library=get_plotlyjs(),
        data=json.dumps(list(plans)).replace("<", "\\u003c"),
    )


def verdict(plan: dict[str, Any]) -> tuple[str, str]:
    """(class of its colour, the answer in a sentence)."""
    if not plan["layouts"]:
        least = plan["smallest"]
        told = "" if least is None else f": the least that was found needs {_of(least)} a rank ({least['name']})"
        return "refuted", f"No layout fits{told}. Use more chips, ones with more memory, or shorter rows."
    first = plan["layouts"][0]
    if first["tight"]:
        return "unsure", (
            f"The fastest that fits is tight: {first['name']}. It may need up to "
            f"{first['most_bytes'] / _GIB:.1f} GiB: rehearse it. With most room of those below: {plan['chosen']}."
        )
    return "holds", f"Fits, and is the fastest: {first['name']}."


def tiles(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a reader asks first of the first layout: title, value, and what the value is of."""
    first = plan["layouts"][0]
    low, high = first["interval_seconds"]
    left = (first["usable_bytes"] - first["peak_bytes"]) / _GIB
    found = [
        ("a step", f"{first['seconds']:.3g} s", f"between {low:.3g} and {high:.3g} s"),
        ("memory of the fullest rank", _of(first), f"{left:.1f} GiB left"),
        (
            "speed",
            f"{100 * first['mfu']:.1f} % MFU",
            f"{first['tokens_per_second_per_rank']:,.0f} tokens/s a rank",
        ),
    ]
    if first["cost"] is not None:
        found.append(
            (f"{plan['steps']:,} steps", f"cost {first['cost']:,.0f}", f"between {_range(first['cost_between'])}")
        )
    elif first["hours"] is not None:
        hours = f"between {_range(first['hours_between'], ' h', 1)}"
        found.append((f"{plan['steps']:,} steps", f"{first['hours']:,.1f} h", hours))
    else:
        found.append(("energy", f"{first['kwh_per_step']:,.1f} kWh", "a step, the whole machine"))
    return found


def beside(plans: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A header and a row for each job; after the first, in times of the first where both have a layout."""
    rows = [["job", "a step, s", "between", "MFU", "kWh a step", "cost a step", "GiB left", "layout"]]
    base = plans[0]["layouts"][0] if plans[0]["layouts"] else None
    for number, plan in enumerate(plans):
        if not plan["layouts"]:
            least = plan["smallest"]
            told = "none fits" if least is None else f"none fits: {_of(least)} a rank at least"
            rows.append([pictures.job(plan), *["–"] * 6, told])
            continue
        first = plan["layouts"][0]
        low, high = first["interval_seconds"]
        against = base if number else None
        cost = first["cost_per_step"]
        rows.append(
            [
                pictures.job(plan),
                _times(first, against, "seconds", ".2f"),
                f"{low:.1f} to {high:.1f}",
                f"{100 * first['mfu']:.1f} %",
                _times(first, against, "kwh_per_step", ",.2f"),
                "–" if cost is None else _times(first, against, "cost_per_step", ",.2f"),
                f"{(first['usable_bytes'] - first['peak_bytes']) / _GIB:.1f}",
                first["name"],
            ]
        )
    return rows


def beside_in_words(plans: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What each job after the first comes to beside it: (class of its colour, a sentence)."""
    base, found = plans[0], []
    for plan in plans[1:]:
        name = pictures.job(plan)
        if not (base["layouts"] and plan["layouts"]):
            lacking = "the first" if not base["layouts"] else "it"
            found.append(("refuted", f"{name}: no comparison, since no layout fits {lacking}."))
            continue
        one, other = base["layouts"][0], plan["layouts"][0]
        parts = [(other[key] / one[key], what) for key, what in _COSTS if one[key] and other[key] is not None]
        told = ", ".join(f"{share:.2f} of its {what}" for share, what in parts)
        starts, ends = zip(one["interval_seconds"], other["interval_seconds"], strict=True)
        sure = "; the intervals of their steps overlap" if max(starts) <= min(ends) else ""
        found.append(("unsure" if sure else "holds", f"{name}: beside the first {told}{sure}."))
    return found


_COSTS = (("seconds", "time"), ("kwh_per_step", "energy"), ("cost_per_step", "cost"))


def _times(first: dict[str, Any], base: dict[str, Any] | None, key: str, form: str) -> str:
    text = format(first[key], form)
    return f"{text} (× {first[key] / base[key]:.2f})" if base is not None and base[key] else text


def _figures(plan: dict[str, Any], group: str) -> dict[str, str]:
    found = {
        "memory": pictures.memory,
        "layouts": pictures.layouts,
        "passing": pictures.passing,
        "effects": pictures.effects,
    }
    return {name: drawn(draw(plan), group) for name, draw in found.items()}


def _money(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Energy, time and cost, of a step and of the run; what was not given says so."""
    first = plan["layouts"][0]
    power = f"{plan['watts_per_rank']:,.0f} W a rank, its share of the whole machine"
    rows = [("a step", f"{first['kwh_per_step']:,.2f} kWh, at {power}")]
    if first["cost_per_step"] is None:
        rows.append(("cost", "not known: no --price of a chip-hour or --price-kwh was given"))
    else:
        prices = [(plan["price_per_chip_hour"], "a chip-hour"), (plan["price_per_kwh"], "a kWh")]
        given = " and ".join(f"{price:,.4g} {unit}" for price, unit in prices if price is not None)
        rows.append(("cost of a step", f"{first['cost_per_step']:,.2f}, at {given}"))
    if plan["steps"] is None:
        rows.append(("the run", "not known: no --steps were given"))
        return rows
    rows.append(
        (f"{plan['steps']:,} steps", f"{first['hours']:,.1f} h, between {_range(first['hours_between'], ' h', 1)}")
    )
    rows.append(("energy", f"{first['kwh']:,.0f} kWh, between {_range(first['kwh_between'], ' kWh')}"))
    if first["cost"] is not None:
        rows.append(("cost of the run", f"{first['cost']:,.0f}, between {_range(first['cost_between'])}"))
    share = plan["reliability"]["effective_share"]
    if share > 0:
        rows.append(
            ("with interruptions", f"{first['hours'] / share:,.1f} h at the effective share of time below")
        )
    return rows


def _reliability(plan: dict[str, Any]) -> list[tuple[str, str]]:
    found = plan["reliability"]
    dense, experts = found["dense_copies"], found["expert_copies"]
    copies = f"{dense} {'copy' if dense == 1 else 'copies'} of dense state, {experts} of routed experts"
    if found["replica_recovery"]:
        modes = f"from a replica or a checkpoint: {copies}"
    else:
        modes = f"from a checkpoint alone: {copies}; parallel.replicate above 1 gives copies"
    return [
        (
            "interruptions",
            f"one every {found['hours_between']:,.1f} h, at {found['failures_per_device_hour']:.2e} a rank and "
            "hour",
        ),
        (
            "checkpoint",
            f"every {found['checkpoint_every_seconds'] / 60:,.0f} min loses least "
            f"({found['checkpoint_seconds']:g} s each, {found['restart_seconds']:g} s to restart)",
        ),
        ("effective share of time", f"{100 * found['effective_share']:.1f} %"),
        ("recovery", modes),
    ]


def _of(what: dict[str, Any]) -> str:
    return f"{what['peak_bytes'] / _GIB:.1f} of {what['usable_bytes'] / _GIB:.1f} GiB"


def _range(between: Sequence[float], unit: str = "", digits: int = 0) -> str:
    low, high = between
    return f"{low:,.{digits}f} and {high:,.{digits}f}{unit}"
