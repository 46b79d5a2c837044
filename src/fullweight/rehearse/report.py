"""A rehearsal for people: tables on the terminal, and one page with a memory curve and the exchanges of each role.

The page is one file (`report/page.py`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from rich.table import Table

from fullweight.ops import OPERATIONS, torch_alone
from fullweight.rehearse.memory import CATEGORIES
from fullweight.rehearse.result import Rehearsal, RoleResult
from fullweight.report import page

_TEMPLATE = Path(__file__).parent / "templates" / "rehearsal.html"
_GIB = 2**30
_COLOURS = ("#31456b", "#5b7db1", "#7aa6a1", "#9a7fb0", "#d98b4a", "#c9b458", "#b0b4ba")


def memory_table(rehearsal: Rehearsal) -> Table:
    """Peak of each role by category, in GiB."""
    layout = " x ".join(f"{axis} {size}" for axis, size in rehearsal.layout.items() if size > 1) or "one rank"
    title = f"{rehearsal.num_ranks} ranks of {rehearsal.chip}: {layout}; GiB at each role's peak"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("role")
    table.add_column("ranks", justify="right")
    for category in CATEGORIES:
        table.add_column(str(category), justify="right")
    for title in ("peak", "usable", "fits"):
        table.add_column(title, justify="right")
    table.add_column("where")
    for role in rehearsal.roles:
        parts = [f"{role.peak_by_category[str(c)] / _GIB:.2f}" for c in CATEGORIES]
        usable = rehearsal.usable_bytes[role.role]
        fits = rehearsal.fits(role)
        verdict = "[green]yes[/]" if fits else "[bold red]no[/]"
        numbers = (*parts, f"{role.peak_bytes / _GIB:.2f}", f"{usable / _GIB:.1f}", verdict)
        table.add_row(role.role, str(role.num_ranks), *numbers, role.peak_module)
    return table


def exchange_table(rehearsal: Rehearsal) -> Table:
    """What each role gives to collectives in a step, by axis and kind."""
    table = Table(
        title=f"collectives of a step, {rehearsal.rows_per_rank} micro-batches: count, GiB given by the rank",
        title_justify="left",
        box=None,
    )
    table.add_column("role")
    for title in ("axis", "ranks", "kind", "count", "GiB"):
        table.add_column(title, justify="right")
    for role in rehearsal.roles:
        counts, sizes, widths = Counter[tuple[str, str]](), Counter[tuple[str, str]](), {}
        for e in role.exchanges:
            counts[e.axis, e.kind] += e.count
            sizes[e.axis, e.kind] += e.num_bytes
            widths[e.axis, e.kind] = e.axis_size
        for key, size in sizes.most_common():
            row = (key[0], str(widths[key]), key[1], f"{counts[key]:,}", f"{size / _GIB:.3f}")
            table.add_row(role.role, *row)
    return table


def operations_note(rehearsal: Rehearsal) -> str:
    """Whose operations were counted, and how those of the chip are, where they are others."""
    told = f"operations counted: {rehearsal.operations}"
    if rehearsal.of_the_chip:
        return f"{told}, which are those of {rehearsal.chip}"
    others = f"{told}. {rehearsal.chip} runs its own, which may hold more"
    if rehearsal.chip.startswith("ascend"):
        return (
            f"{others}: --device ascend --ops ascend counts them where the vendor's library for torch imports (no "
            "chip is needed: docs/ascend.md), and fullweight plan anywhere"
        )
    return f"{others}: --ops {torch_alone(OPERATIONS)[0]} counts them, on any machine"


def write_page(rehearsal: Rehearsal, path: Path) -> None:
    """Write the HTML page."""
    page.write_page(
        path,
        _TEMPLATE,
        rehearsal=rehearsal,
        operations=operations_note(rehearsal),
        categories=[str(c) for c in CATEGORIES],
        gib=_GIB,
        curves={role.role: _curve(role, rehearsal.usable_bytes[role.role]) for role in rehearsal.roles},
        matrix=_matrix(rehearsal),
        flops={role.role: sum(role.flops_by_operation.values()) for role in rehearsal.roles},
    )


def _curve(role: RoleResult, usable: int) -> str:
    figure, axis = pyplot.subplots(figsize=(9, 3.2))
    series = [np.array(role.timeline.by_category[str(c)]) / _GIB for c in CATEGORIES]
    axis.stackplot(role.timeline.moments, *series, labels=[str(c) for c in CATEGORIES], colors=_COLOURS)
    axis.axhline(usable / _GIB, color="#a12622", linewidth=1, linestyle="--", label="usable on the chip")
    axis.set(xlabel="operations", ylabel="GiB", title=f"{role.role}: memory through the step")
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper left")
    axis.set_ylim(0, max(usable, role.peak_bytes) / _GIB * 1.3)
    axis.spines[["top", "right"]].set_visible(False)
    return page.inside(page.png(figure))


def _matrix(rehearsal: Rehearsal) -> str:
    axes = sorted({e.axis for role in rehearsal.roles for e in role.exchanges})
    values = np.zeros((len(rehearsal.roles), max(len(axes), 1)))
    for i, role in enumerate(rehearsal.roles):
        for exchange in role.exchanges:
            values[i, axes.index(exchange.axis)] += exchange.num_bytes / _GIB
    figure, plot = pyplot.subplots(figsize=(2.5 + 1.3 * len(axes), 1.2 + 0.35 * len(rehearsal.roles)))
    image = plot.imshow(values, cmap="Blues", aspect="auto")
    plot.set_xticks(range(len(axes)), axes, rotation=20)
    plot.set_yticks(range(len(rehearsal.roles)), [role.role for role in rehearsal.roles])
    for (i, j), value in np.ndenumerate(values):
        plot.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="#1c1f24")
    figure.colorbar(image, label="GiB given in a step")
    plot.set_title("communication: role by mesh axis")
    return page.inside(page.png(figure))
