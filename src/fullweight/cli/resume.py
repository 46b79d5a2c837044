"""`fullweight resume`: continue an interrupted run exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fullweight.cli.train import console, report


def resume_command(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    *,
    on_corrupt: Annotated[
        Literal["refuse", "previous"],
        typer.Option(help="a damaged checkpoint: refuse and say what is wrong, or take the newest good one"),
    ] = "refuse",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="a.b=c, what may change from now on, such as train.num_steps=200; repeatable"),
    ] = None,
) -> None:
    """Continue a run from its newest checkpoint, as if it had never stopped; on any number of ranks."""
    from fullweight.checkpoint.generations import OnCorrupt
    from fullweight.train.loop import resume

    report(resume(run, console(), OnCorrupt(on_corrupt), overrides or []))
