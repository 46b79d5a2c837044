"""`fullweight replay`: repeat steps of a recorded run and compare."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text

if TYPE_CHECKING:
    from fullweight.audit.again import Means
    from fullweight.audit.layer import LayerResult
    from fullweight.audit.recorded import Recorded
    from fullweight.audit.replay import ReplayResult
    from fullweight.audit.windows import Window

_UNCHECKED = 3


class Level(StrEnum):
    """How much of a run is repeated."""

    step = "step"
    layer = "layer"


def replay_command(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    *,
    window: Annotated[
        list[str] | None, typer.Option(help="a:b, the steps after a up to b; repeatable (the last kept one)")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="draw so many windows between kept states")] = None,
    beacon: Annotated[
        str | None, typer.Option(help="what is drawn with: a public value that was not known to the trainer")
    ] = None,
    level: Annotated[
        Level, typer.Option(help="step: whole steps; layer: single pieces of the model from stored boundaries")
    ] = Level.step,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="a layer's number, embedding, mtp, head or stage-K; repeatable (all that are stored)"),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="draw so many pieces, with --beacon")] = None,
    boundaries: Annotated[
        list[Path] | None,
        typer.Option(help="a step's folder of boundaries; repeatable (those that the run stored)"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder with the run's data files, if not where they were")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="the device to repeat on, by its name in recipes, instead of the recorded one"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of a rank (as recorded)")] = None,
    bound: Annotated[
        float | None,
        typer.Option(min=0, help="relative distance that is rounding elsewhere (1e-3; with bf16, 5e-3 a step)"),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="where two states are written meanwhile (temporary)")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all differences here")] = None,
) -> None:
    """Repeat steps of a run from a kept state and compare losses, gradients and weights with its record.

    On the same machine and number of threads every bit must be equal, elsewhere within a bound; a window beyond it
    is repeated with its first weights nudged by a rounding, which decides near ties. Exit status 0: verified, 1:
    refuted, 3: not checkable here. Under torchrun several ranks work together.
    """
    from fullweight.audit.again import Means
    from fullweight.audit.recorded import Recorded
    from fullweight.audit.replay import Verdict, replay
    from fullweight.cli.train import console
    from fullweight.train.run_folder import RunFolder

    require_folder(json_file)
    if level is Level.layer:
        if window or windows or (layers is None) != (beacon is None) or (layers and layer):
            raise typer.BadParameter(
                "--level layer goes with --layer, or with --layers and --beacon, and with no windows"
            )
        drawn = None if layers is None or beacon is None else (layers, beacon)
        _layers(run, boundaries or [], layer or [], drawn, Means(None, None, threads, scratch), bound, json_file)
        return
    if layer or layers or boundaries:
        raise typer.BadParameter("--layer, --layers and --boundaries go with --level layer")
    if (windows is None) != (beacon is None) or (windows is not None and window):
        raise typer.BadParameter("--windows and --beacon go together, and not with --window")
    chosen = _chosen(Recorded.of(RunFolder(run)), window or [], windows, beacon)
    results = replay(run, chosen, Means(data, device, threads, scratch), bound)
    screen = console()
    for result in results:
        screen.print(told(result), markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        _write(json_file, results)
    verdicts = {result.verdict for result in results}
    if Verdict.refuted in verdicts:
        raise typer.Exit(1)
    if Verdict.unchecked in verdicts:
        raise typer.Exit(_UNCHECKED)


def told(result: ReplayResult) -> str:
    """A window in a few lines."""
    lines = [f"steps {result.window}: {result.verdict}: {result.reason} ({result.seconds:.1f} s)"]
    lines += [f"  bits may differ: {reason}" for reason in result.stack]
    if result.roots is not None:
        lines.append(f"  state root {result.roots[0].root}, replayed {result.roots[1].root}")
    return _plain("\n".join(lines))


def _layers(
    run: Path,
    folders: list[Path],
    chosen: list[str],
    drawn: tuple[int, str] | None,
    means: Means,
    bound: float | None,
    json_file: Path | None,
) -> None:
    from fullweight.audit.layer import repeat_layers
    from fullweight.audit.replay import Verdict

    results = repeat_layers(run, folders, means, bound, chosen=chosen, drawn=drawn)
    for result in results:
        typer.echo(told_layer(result))
    if json_file is not None:
        _write(json_file, results)
    verdicts = {result.verdict for result in results}
    if Verdict.refuted in verdicts:
        raise typer.Exit(1)
    if Verdict.unchecked in verdicts:
        raise typer.Exit(_UNCHECKED)


def told_layer(result: LayerResult) -> str:
    """A piece in a line or a few."""
    size = f" ({result.num_bytes / 1e6:,.1f} MB of weights)" if result.num_bytes else ""
    failure = "" if result.failure is None else f" {result.failure}"
    lines = [f"step {result.step} {result.piece}{size}: {result.verdict}:{failure} {result.reason}"]
    if result.num_bytes and not result.after:
        lines.append(f"  not compared: weights after it, for no state of step {result.step} is kept")
    if result.num_bytes and not result.bound_in_ledger:
        lines.append("  the ledger does not name these files; compare their root with a published one")
    return _plain("\n".join([*lines, *(f"  bits may differ: {reason}" for reason in result.stack)]))


def _plain(text: str) -> str:
    """A stranger's text: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _chosen(recorded: Recorded, given: list[str], count: int | None, beacon: str | None) -> list[Window]:
    from fullweight.audit.windows import Window, candidates, draw
    from fullweight.core.errors import CheckpointError

    if given:
        return [Window.parse(text) for text in given]
    found = candidates(list(recorded.kept()))
    if not found:
        raise CheckpointError(
            f"no state is kept in {recorded.folder.checkpoints}; name a window from the beginning, such as "
            "--window 0:5"
        )
    return found[-1:] if count is None or beacon is None else draw(found, recorded.head, beacon, count)


def _write(path: Path, results: Sequence[ReplayResult | LayerResult]) -> None:
    import json
    from dataclasses import asdict

    from fullweight.evidence.ledger import finite

    write_text(path, json.dumps([finite(asdict(r)) for r in results], indent=2) + "\n")
