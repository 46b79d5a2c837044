"""`fullweight replay`: repeat steps of a recorded run and compare."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
        Level, typer.Option(help="step: whole steps; layer: single layers from the files of --boundaries")
    ] = Level.step,
    boundaries: Annotated[
        Path | None, typer.Option(help="folder of layers' boundaries (`fullweight boundaries`)")
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

    On the same machine and number of threads every bit must be equal, elsewhere within a bound. Exit status 0:
    verified, 1: refuted, 3: not checkable here. Under torchrun several ranks work together.
    """
    from fullweight.audit.again import Means
    from fullweight.audit.recorded import Recorded
    from fullweight.audit.replay import Verdict, replay
    from fullweight.cli.train import console
    from fullweight.train.run_folder import RunFolder

    if (level is Level.layer) != (boundaries is not None):
        raise typer.BadParameter("--level layer and --boundaries go together")
    if boundaries is not None:
        _layers(run, boundaries, Means(None, None, threads, scratch), bound, json_file)
        return
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


def _layers(run: Path, folder: Path, means: Means, bound: float | None, json_file: Path | None) -> None:
    from fullweight.audit.layer import repeat_layers

    results = repeat_layers(run, folder, means, bound)
    for result in results:
        typer.echo(told_layer(result))
    if json_file is not None:
        _write(json_file, results)
    if any(result.divergent is not None for result in results):
        raise typer.Exit(1)


def told_layer(result: LayerResult) -> str:
    """A layer in a line or a few."""
    largest = max(result.distances.values())
    how = "every bit is equal" if result.exact else f"largest relative distance {largest:.1e}"
    if result.divergent is not None:
        how = f"{result.divergent} differs, by {result.distances[result.divergent]:.1e}; {how}"
    verdict = "verified" if result.divergent is None else "refuted"
    lines = [f"layer {result.layer} ({result.num_bytes / 1e6:,.1f} MB of weights): {verdict}: {how}"]
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

    from fullweight.core.errors import CheckpointError
    from fullweight.evidence.ledger import finite

    try:
        path.write_text(json.dumps([finite(asdict(r)) for r in results], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; name another file") from None
