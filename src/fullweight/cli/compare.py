"""`fullweight compare`: twin runs side by side, ours or another framework's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text, writing
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from fullweight.evidence.compare import Side
    from fullweight.evidence.parting import Parting

DIFFERENT, UNDECIDED = 1, 3


def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(help="run folder, bundle, .csv or TensorBoard folder; commas join seeds of one recipe"),
    ],
    *,
    tolerance: Annotated[
        float, typer.Option(min=0, help="relative difference of the loss that is allowed")
    ] = 0.01,
    window: Annotated[int, typer.Option(min=1, help="steps of the running mean that is compared")] = 1,
    target: Annotated[
        float | None, typer.Option(help="loss whose time is told; the best that all reached")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="lm=NAME: what a CSV or TensorBoard log calls one of our numbers")
    ] = None,
    weights: Annotated[bool, typer.Option(help="compare checkpoints of the same step too")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with the curves here")] = None,
) -> None:
    """Compare runs with the first: where losses and weights part, throughput, energy, time to a loss.

    Exit status 0 when all are identical or equivalent to the first, 1 when one differs, 3 when the spread over
    seeds is too wide to tell.
    """
    import json

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fullweight.evidence.compare import Verdict, compare
    from fullweight.report.comparison import cost_rows, described, facts_of, write_comparison

    require_folder(json_file, html_file)
    sides = _sides(runs, column or [])
    comparison = compare(sides, tolerance=tolerance, window=window, target=target)
    partings = [_parting(sides[0], other) if weights else None for other in sides[1:]]

    console = Console(soft_wrap=True)
    for side in sides:
        console.print(Text(f"{side.name}: {facts_of(side)}"))
    table = Table(box=None)
    header, *rows = cost_rows(comparison)
    for title in header:
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for pair, parting in zip(comparison.pairs, partings, strict=True):
        console.print(_differences(pair.differences))
        console.print(Text(f"{pair.a}, {pair.b}: {pair.told}", style="bold"))
        if parting is not None:
            console.print(Text(str(parting)))
    if json_file is not None:
        text = json.dumps(described(comparison, sides, partings), indent=2, allow_nan=False)
        write_text(json_file, text + "\n")
    if html_file is not None:
        with writing(html_file):
            write_comparison(html_file, comparison, sides, partings)
    found = {pair.verdict for pair in comparison.pairs}
    if Verdict.different in found:
        raise typer.Exit(DIFFERENT)
    if Verdict.undecided in found:
        raise typer.Exit(UNDECIDED)


def _sides(runs: list[str], columns: list[str]) -> list[Side]:
    from fullweight.evidence.compare import Side
    from fullweight.evidence.curves import read_curve

    if len(runs) < 2:
        raise ConfigError("compare takes two runs or more; seeds of one recipe are joined by commas into one")
    renamed = {}
    for text in columns:
        ours, equals, theirs = text.partition("=")
        if not equals or not ours or not theirs:
            raise ConfigError(f"--column takes ours=theirs, such as lm=train/loss; found {text!r}")
        renamed[ours] = theirs
    paths = [[Path(part) for part in run.split(",") if part] for run in runs]
    names = [
        group[0].resolve().name + (f" and {len(group) - 1} more" if len(group) > 1 else "") for group in paths
    ]
    if len(set(names)) < len(names):  # of two folders with one name, where they are tells them apart
        names = [run if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError(f"{runs[0]} is given twice; compare different runs")
    return [
        Side(name, tuple(read_curve(path, renamed) for path in group))
        for name, group in zip(names, paths, strict=True)
    ]


def _parting(a: Side, b: Side) -> Parting | None:
    """Where the weights part, when both sides are run folders, or bundles with checkpoints."""
    from fullweight.evidence.parting import parting, weights_in

    folders = [side.curves[0].path / "checkpoints" for side in (a, b)]
    return parting(folders[0], folders[1]) if all(weights_in(folder) for folder in folders) else None


def _differences(differences):  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table(box=None)
    for title in ("", "steps", "first unequal", "first beyond", "largest", "at step", "mean"):
        table.add_column(title, justify="right" if title else "left")
    for d in differences:
        first, beyond = ("never" if step is None else str(step) for step in (d.first_unequal, d.first_beyond))
        table.add_row(
            d.metric, str(d.num_steps), first, beyond, f"{d.largest:.3g}", str(d.largest_at), f"{d.mean:.3g}"
        )
    return table
