"""A plan as one page that needs no network: memory stacks, the step by part, and jobs side by side.

Drawn from what `report.describe` gives, so that the page says what the JSON says. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from fullweight.report import page

_TEMPLATE = Path(__file__).parent / "templates" / "plan.html"
_GIB = 2**30
_CATEGORIES = ("parameters", "optimizer", "gradients", "gathered", "activations", "communication", "temporaries")


def write_page(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of one plan, or of several side by side."""
    pictures = [
        {"memory": _memory(plan["layouts"][0]), "time": _time(plan["layouts"][0])} if plan["layouts"] else {}
        for plan in plans
    ]
    page.write_page(path, _TEMPLATE, plans=plans, pictures=pictures, sweep=_sweep(plans) if len(plans) > 1 else "")


def _memory(layout: dict[str, Any]) -> str:
    """Stacks by pipeline rank. Categories are each at their worst, so a stack may be above the peak, a mark."""
    stages = layout["stages"]
    figure, axis = pyplot.subplots(figsize=(9, 3.4))
    below = [0.0] * len(stages)
    for name in _CATEGORIES:
        sizes = [stage[name] / _GIB for stage in stages]
        axis.bar(range(len(stages)), sizes, bottom=below, label=name, width=0.7)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    axis.plot(range(len(stages)), [stage["peak"] / _GIB for stage in stages], "k_", markersize=18, label="peak")
    axis.axhline(layout["usable_bytes"] / _GIB, color="#a12622", linestyle="--", linewidth=1, label="limit")
    axis.set(xlabel="pipeline rank", ylabel="GiB", title="memory, each category at its worst")
    axis.set_xticks(range(len(stages)))
    axis.legend(frameon=False, fontsize=7, ncols=5)
    axis.set_ylim(0, max(*below, layout["usable_bytes"] / _GIB) * 1.3)
    return page.inside(page.png(figure))


def _time(layout: dict[str, Any]) -> str:
    parts = {name: value for name, value in layout["seconds_by_part"].items() if value > 0.002 * layout["seconds"]}
    figure, axis = pyplot.subplots(figsize=(9, 3))
    begin = 0.0
    for name, seconds in parts.items():
        axis.barh(0, seconds, left=begin, label=f"{name.replace('_', ' ')} {seconds:.2f} s")
        begin += seconds
    axis.set(xlabel="seconds", yticks=[], title="one step")
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return page.inside(page.png(figure))


def _sweep(plans: Sequence[dict[str, Any]]) -> str:
    """Seconds and energy of a step, one mark for each job that has a layout."""
    known = [plan for plan in plans if plan["layouts"]]
    names = [f"{plan['model']}\n{plan['chip']} x{plan['ranks']}\n{plan['sequence']}" for plan in known]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for axis, key, label in ((axes[0], "seconds", "seconds a step"), (axes[1], "kwh_per_step", "kWh a step")):
        axis.plot(range(len(known)), [plan["layouts"][0][key] for plan in known], "o-")
        axis.set_xticks(range(len(known)), names, fontsize=6)
        axis.set(ylabel=label)
        axis.set_ylim(bottom=0)
    return page.inside(page.png(figure))
