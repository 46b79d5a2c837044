"""`fullweight boundaries`: what enters and leaves layers of a run, for `fullweight replay --level layer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def boundaries_command(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    *,
    step: Annotated[int, typer.Option(min=1, help="a kept state; the next step's first row is taken")],
    layer: Annotated[list[int], typer.Option(min=0, help="a layer, from 0; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for the files, one a layer")],
    data: Annotated[
        Path | None, typer.Option(help="folder with the run's data files, if not where they were")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads (as recorded)")] = None,
) -> None:
    """Keep what enters and leaves layers in one micro-batch, and its gradients, so that each can be checked alone.

    This takes the whole model; `fullweight replay RUN --level layer --boundaries OUT` then takes a layer alone.
    """
    import tempfile

    from fullweight.audit.again import Means
    from fullweight.audit.boundaries import record
    from fullweight.audit.recorded import Recorded
    from fullweight.train.loop import joined_for, load_config
    from fullweight.train.run_folder import RunFolder

    recorded = Recorded.of(RunFolder(run))
    with joined_for(load_config(recorded.folder)) as ranks, tempfile.TemporaryDirectory() as scratch:
        means = Means(data, None, threads, None)
        found = record(recorded, step, sorted(set(layer)), out, ranks, Path(scratch), means)
    for path, digest in found.items():
        typer.echo(f"{path}: {digest.size_bytes / 1e6:,.1f} MB, SHA-256 {digest.sha256}")
