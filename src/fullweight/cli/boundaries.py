"""`fullweight boundaries`: what passes between pieces of a run's model, for `fullweight replay --level layer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def boundaries_command(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    *,
    step: Annotated[int, typer.Option(min=1, help="a kept state; the step after it is taken again")],
    layer: Annotated[
        list[str] | None, typer.Option(help="a layer's number, embedding, mtp or head; repeatable (all)")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the files; what is in it goes")],
    data: Annotated[
        Path | None, typer.Option(help="folder with the run's data files, if not where they were")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads (as recorded)")] = None,
) -> None:
    """Take a recorded step again and keep what enters and leaves pieces of the model, and its gradients.

    This takes the whole model, under torchrun several ranks; `fullweight replay RUN --level layer --boundaries
    OUT` then takes a piece alone. A run with boundaries.every stores the same by itself, and binds it in its
    ledger.
    """
    import tempfile

    from fullweight.audit.again import Means
    from fullweight.audit.boundaries import record
    from fullweight.audit.recorded import Recorded
    from fullweight.core.errors import ConfigError
    from fullweight.models.deepseek_v4.parts import pieces
    from fullweight.train.boundaries import INDEX
    from fullweight.train.loop import joined_for, load_config
    from fullweight.train.run_folder import RunFolder

    if out.exists() and any(out.iterdir()) and not (out / INDEX).is_file():
        raise ConfigError(f"{out} holds something else than boundaries; name another --out")
    recorded = Recorded.of(RunFolder(run))
    config = load_config(recorded.folder)
    architecture = config.model.architecture()
    every = pieces(architecture.num_hidden_layers, architecture.num_nextn_predict_layers > 0)
    chosen = [f"layer-{name}" if name.isdecimal() else name for name in layer] if layer else list(every)
    with joined_for(config) as ranks, tempfile.TemporaryDirectory() as scratch:
        shared = Path(ranks.broadcast(scratch))
        stored = record(recorded, step, chosen, out, ranks, shared, Means(data, None, threads, None))
        ranks.barrier()
    if ranks.is_main:
        for found in stored.files:
            typer.echo(f"{out / found.name}: {found.size_bytes / 1e6:,.1f} MB, SHA-256 {found.sha256}")
        typer.echo(f"root to publish: {stored.root}")
