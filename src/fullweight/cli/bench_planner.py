"""`fullweight bench planner`: the cost model against training runs that others published."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text, writing
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fullweight.planner.fit import Judgement
    from fullweight.planner.published import Rejected


def bench_planner_command(
    *,
    data: Annotated[
        Path | None, typer.Option(help="folder of such tables to fit; those of the package if absent")
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(help="folder of such tables that the package's coefficients predict, without a fit"),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="write the fitted coefficients here (TOML)")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every case here")] = None,
) -> None:
    """Fit the planner's coefficients on published runs and show its error, seen and unseen, beside a null
    model."""
    from rich.console import Console

    from fullweight.planner.coefficients import Calibration
    from fullweight.planner.cost import Coefficients
    from fullweight.planner.fit import fit, interval, judge, orders
    from fullweight.planner.published import load

    require_folder(write, json_file)
    if unseen is not None:
        if data is not None or write is not None:
            raise ConfigError("--unseen fits nothing: leave out --data and --write")
        _print_unseen(unseen, json_file)
        return
    cases, rejected = load(data)
    coefficients = fit(cases)
    judgements = judge(cases, coefficients)
    console = Console(width=max(Console().width, 140))
    _print_rejected(console, rejected)
    _print_cases(console, judgements)
    _print_groups(console, judgements)
    found = orders(judgements)
    for order in found:
        console.print(
            f"{order.name}: {order.num_layouts} layouts, first choice {order.first_over_best - 1:.1%} above the "
            f"best measured, rank correlation {order.rank_correlation:.2f}",
            highlight=False,
        )
    _print_totals(console, judgements, len(Coefficients.names()), len(rejected))
    console.print(", ".join(f"{name} {value:g}" for name, value in asdict(coefficients).items()), highlight=False)
    spreads = {kind: interval([j.unseen for j in judgements if j.case.kind == kind]) for kind in ("dense", "moe")}
    if write is not None:
        with writing(write):
            Calibration(coefficients, spreads["dense"], spreads["moe"], len(cases)).write(write)
    if json_file is not None:
        record = {
            "coefficients": asdict(coefficients),
            "cases": [
                {"name": j.case.name, "group": j.case.group, "kind": j.case.kind, "seconds": j.case.seconds}
                | {"fitted": j.fitted, "unseen": j.unseen, "source_unseen": j.source_unseen}
                | {"null": j.null, "null_unseen": j.null_unseen}
                for j in judgements
            ],
            "rejected": [asdict(r) for r in rejected],
            "orders": [asdict(o) for o in found],
        }
        write_text(json_file, json.dumps(record, indent=2) + "\n")


_KINDS = ("fitted", "unseen", "source_unseen", "null")


def _print_unseen(folder: Path, json_file: Path | None) -> None:
    """Runs that had no part in the fit, beside a null model of the package's runs."""
    from rich.console import Console

    from fullweight.planner.coefficients import calibration
    from fullweight.planner.fit import mean_error, predict
    from fullweight.planner.published import load

    cases, rejected = load(folder)
    found = predict(cases, calibration().coefficients, load()[0])
    console = Console(width=max(Console().width, 140))
    _print_rejected(console, rejected)
    for p in found:
        console.print(
            f"{p.case.name}: {p.seconds:.2f} s predicted, {p.case.seconds:.2f} s measured, {p.error:+.1%} "
            f"(null model {p.null:+.1%})",
            highlight=False,
            markup=False,
        )
    for kind, wanted in (("all", ("dense", "moe")), ("dense", ("dense",)), ("moe", ("moe",))):
        chosen = [p for p in found if p.case.kind in wanted]
        if chosen:
            errors = mean_error([p.error for p in chosen]), mean_error([p.null for p in chosen])
            console.print(
                f"{kind}: {len(chosen)} runs, mean error {errors[0]:.1%}; null model {errors[1]:.1%}",
                highlight=False,
            )
    if json_file is not None:
        record = [
            {"name": p.case.name, "seconds": p.case.seconds, "predicted": p.seconds, "null_error": p.null}
            for p in found
        ]
        write_text(json_file, json.dumps(record, indent=2) + "\n")


def _print_rejected(console: Console, rejected: list[Rejected]) -> None:
    for row in rejected:
        console.print(f"rejected {row.name}: {row.reason}", highlight=False, markup=False)


def _print_cases(console: Console, judgements: list[Judgement]) -> None:
    from rich.table import Table

    table = Table(title="predicted over measured step time, minus 1", title_justify="left", box=None)
    for name in ("case", "seconds", "MFU", "fitted", "unseen", "source unseen", "null"):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for j in judgements:
        table.add_row(
            j.case.name,
            f"{j.case.seconds:.2f}",
            f"{j.case.mfu:.1%}",
            *(f"{x:+.1%}" for x in (j.fitted, j.unseen, j.source_unseen, j.null)),
        )
    console.print(table)


def _print_groups(console: Console, judgements: list[Judgement]) -> None:
    from rich.table import Table

    from fullweight.planner.fit import mean_error

    table = Table(title="mean absolute error by what is left out together", title_justify="left", box=None)
    for name in ("group", "runs", "fitted", "unseen", "source unseen", "null"):
        table.add_column(name, justify="left" if name == "group" else "right", no_wrap=True)
    for group in sorted({j.case.group for j in judgements}):
        chosen = [j for j in judgements if j.case.group == group]
        errors = (mean_error([getattr(j, name) for j in chosen]) for name in _KINDS)
        table.add_row(group, str(len(chosen)), *(f"{x:.1%}" for x in errors))
    console.print(table)


def _print_totals(console: Console, judgements: list[Judgement], num_coefficients: int, num_rejected: int) -> None:
    from fullweight.planner.fit import mean_error

    for kind, wanted in (("all", ("dense", "moe")), ("dense", ("dense",)), ("moe", ("moe",))):
        chosen = [j for j in judgements if j.case.kind in wanted]
        errors = [mean_error([getattr(j, name) for j in chosen]) for name in (*_KINDS, "null_unseen")]
        console.print(
            f"{kind}: {len(chosen)} runs, mean error {errors[0]:.1%} (group unseen {errors[1]:.1%}, source unseen "
            f"{errors[2]:.1%}); null model {errors[3]:.1%} (unseen {errors[4]:.1%})",
            highlight=False,
        )
    console.print(
        f"{num_coefficients} coefficients, all global; {len(judgements)} runs; {num_rejected} rows rejected",
        highlight=False,
    )
