"""`fullweight watch`: the page of a run while it is going."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch_command(
    run: Annotated[Path, typer.Argument(help="folder of a run, going or not")],
    *,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="on the loopback address; 0 takes a free one")
    ] = 8686,
) -> None:
    """Serve the report of a run on this machine, drawn again as the run goes; Ctrl-C ends it."""
    from fullweight.report.watch import Watch

    watch = Watch(run, port)
    typer.echo(f"{run} at {watch.url} (Ctrl-C ends it)")
    watch.serve()
