"""`fullweight train`: run a recipe from its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130


def train_command(
    recipe: Annotated[Path, typer.Argument(help="the run's TOML recipe")],
    *,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=c, such as train.num_steps=100; repeatable")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="run folder, new or empty (runs/<name> when absent)")] = None,
) -> None:
    """Train a model as a recipe says, all parameters that it does not freeze; Ctrl-C saves and stops.

    Under `torchrun --nproc-per-node N -m fullweight train ...` the model is sharded over N ranks.
    """
    from fullweight.core.config import apply_overrides, read_toml
    from fullweight.train.config import RunConfig
    from fullweight.train.loop import train

    values = apply_overrides(read_toml(recipe), overrides or [])
    values.setdefault("name", recipe.stem)
    if output is not None:
        values["output"] = str(output)
    report(train(RunConfig.resolve(values, str(recipe)), console()))


def report(outcome: object) -> None:
    """Say how to go on after an interruption, and exit with the status that belongs to it."""
    from fullweight.core.launcher import tell_launcher
    from fullweight.train.loop import Outcome

    assert isinstance(outcome, Outcome)
    if outcome.finished:
        return
    message = (
        f"stopped after step {outcome.step}, state saved; continue with\n  fullweight resume {outcome.folder.root}"
    )
    console().print(message, highlight=False, soft_wrap=True)
    tell_launcher(message)
    raise typer.Exit(INTERRUPTED)


def console():  # type: ignore[no-untyped-def]
    """Where this rank prints: nowhere but on rank 0."""
    import os

    from rich.console import Console

    return Console(quiet=os.environ.get("RANK", "0") != "0")
