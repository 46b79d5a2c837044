"""`fullweight generate`: one answer from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.session import MAX_SEED, Sampling, open_session
from fullweight.core.errors import DataError


def generate_command(
    folder: Annotated[Path, typer.Argument(help="run folder, or a checkpoint folder with its tokenizer")],
    *,
    prompt: Annotated[str, typer.Option(help="what to ask")],
    system: Annotated[str | None, typer.Option(help="system text before it")] = None,
    text: Annotated[bool, typer.Option("--text", help="continue the prompt as plain text, no chat")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
) -> None:
    """Print what the model answers to one prompt."""
    if not prompt.strip():
        raise DataError("--prompt is empty; give the text that the model is to answer")
    session = open_session(folder)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if text:
        typer.echo(session.complete(prompt, sampling))
        return
    messages = [{"role": "system", "content": system}] if system else []
    typer.echo(session.answer([*messages, {"role": "user", "content": prompt}], sampling))
