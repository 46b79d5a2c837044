"""`fullweight chat`: talk with a trained model, turn by turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fullweight.cli.session import Sampling, open_session
from fullweight.core.errors import DataError


def chat_command(
    folder: Annotated[Path, typer.Argument(help="run folder, or a checkpoint folder with its tokenizer")],
    *,
    system: Annotated[str | None, typer.Option(help="system text that opens the conversation")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
) -> None:
    """Talk with the model; an empty line or Ctrl-D ends it."""
    session = open_session(folder)
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    typer.echo("An empty line ends the conversation.")
    while True:
        try:
            asked = input("you: ").strip()
        except EOFError:
            asked = ""
        except UnicodeDecodeError:
            raise DataError("what was typed is not UTF-8; set the terminal or the file to UTF-8") from None
        if not asked:
            return
        messages.append({"role": "user", "content": asked})
        reply = session.answer(messages, Sampling(max_new_tokens, temperature, top_p, seed=len(messages)))
        typer.echo(f"model: {reply}")
        messages.append(_as_message(reply))


def _as_message(reply: str) -> dict[str, Any]:
    """The reply split into reasoning and content, as the encoding takes it back into the conversation."""
    reasoning, closed, content = reply.partition("</think>")
    if not closed:
        return {"role": "assistant", "content": reply}
    return {"role": "assistant", "reasoning_content": reasoning, "content": content}
