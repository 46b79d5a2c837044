"""`fullweight rehearse`: one training step of a large layout, traced on this machine without its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.files import require_folder, write_text, writing


def rehearse_command(
    recipe: Annotated[Path, typer.Argument(help="a TOML recipe")],
    *,
    ranks: Annotated[int, typer.Option(min=1, help="ranks of the job, one for each die or GPU")],
    chip: Annotated[str, typer.Option(help="each rank's device, by its name in the table")] = "ascend-910c",
    chip_file: Annotated[Path | None, typer.Option(help="chips and clusters of your own (TOML)")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated")
    ] = None,
    routing: Annotated[
        str, typer.Option(help="load of the experts: uniform, worst, or a run folder whose largest load is taken")
    ] = "uniform",
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="rows traced of a step; enough for the peak when absent")
    ] = None,
    device: Annotated[
        str, typer.Option(help="whose tensors, without data: cpu or ascend; its library must be there")
    ] = "cpu",
    operations: Annotated[
        str | None, typer.Option("--ops", help="operations that are traced, as ops.default; those of the device")
    ] = None,
    roles: Annotated[
        list[str] | None, typer.Option("--role", help="trace this role alone, such as 'stage 0'; may be repeated")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="roles traced at the same time")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with curves here")] = None,
) -> None:
    """Memory, collectives and FLOPs of each role in a training step, and whether it fits the chip.

    Exits with 2 when a role does not fit. A projection: nothing runs on a chip.
    """
    from rich.console import Console

    from fullweight.planner.chips import chip as find_chip
    from fullweight.rehearse.fake import device_of
    from fullweight.rehearse.report import exchange_table, memory_table, operations_note, write_page
    from fullweight.rehearse.routing import Routing
    from fullweight.rehearse.run import chosen_roles, rehearse
    from fullweight.train.config import RunConfig

    require_folder(json_file, html_file)
    chosen = [] if operations is None else [f"ops.default={operations}"]
    config = RunConfig.from_toml(recipe, [*(overrides or []), *chosen])
    found = find_chip(chip, chip_file)
    device_of(device)
    load = Routing.parse(routing)
    progress = Console(stderr=True)
    total = len(chosen_roles(config.layout(ranks), roles or ()))
    with progress.status(f"tracing {total} role(s)"):
        rehearsal = rehearse(
            config,
            str(recipe),
            ranks,
            found,
            load,
            micro_batches=micro_batches,
            device=device,
            roles=roles or (),
            processes=processes,
            done=lambda result: progress.print(f"{result.role}: traced in {result.trace_seconds:.0f} s"),
        )
    console = Console(width=max(Console().width, 160))
    console.print(memory_table(rehearsal))
    console.print(exchange_table(rehearsal))
    console.print(operations_note(rehearsal), highlight=False, markup=False)
    if json_file is not None:
        write_text(json_file, json.dumps(rehearsal.as_dict(), indent=2) + "\n")
    if html_file is not None:
        with writing(html_file):
            write_page(rehearsal, html_file)
    if not rehearsal.all_fit:
        raise typer.Exit(2)
