"""`fullweight resume`: continue an interrupted run exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.train import console, report


def resume_command(run: Annotated[Path, typer.Argument(help="folder of the run")]) -> None:
    """Continue a run from its newest checkpoint, as if it had never stopped."""
    from fullweight.train.loop import resume

    report(resume(run, console()))
