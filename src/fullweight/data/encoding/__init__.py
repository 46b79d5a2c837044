"""Chat encodings as data: one TOML file per version holds the tokens and every fixed text.

A template is split once into pieces. A piece is either a control token or plain text, and values always enter
as plain text, so nothing a user wrote can become a control token, whatever it spells. A version that differs
little names its `base` and gives only the top-level keys it replaces. The rules that put messages in order
are code (`conversation.py`, `fullweight.data.render`), shared by the versions.
"""

from __future__ import annotations

import string
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal, NamedTuple

from fullweight.core.config import Config, nearest, read_toml
from fullweight.core.errors import ConfigError


class Piece(NamedTuple):
    """A run of plain text, or exactly one control token."""

    text: str
    control: bool = False


class Task(Config):
    """A quick instruction: its token, the role that carries it and where the token goes."""

    token: str
    on: Literal["user", "assistant"]
    opens_turn: bool = False
    inline: str | None = None


class Encoding(Config):
    """Tokens and fixed texts of one encoding version."""

    name: str
    tokens: dict[str, str]
    tasks: dict[str, Task]
    templates: dict[str, str]
    reasoning_efforts: dict[str, str]
    default_reasoning_effort: str

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token, in the order in which a new tokenizer numbers them (bos, eos, pad, ...)."""
        tasks = self.tasks.values()
        inline = [task.inline for task in tasks if task.inline]
        return (*self.tokens.values(), *(task.token for task in tasks), *inline)

    def token(self, name: str) -> Piece:
        """The control token of that name in the [tokens] table."""
        return Piece(self.tokens[name], control=True)

    def fill(self, template: str, **values: str | list[Piece]) -> list[Piece]:
        """Pieces of a template; a string value is plain text, a list of pieces goes in as it is."""
        pieces: list[Piece] = []
        for part in self._parts[template]:
            if isinstance(part, Piece):
                pieces.append(part)
            else:
                value = values[part]
                pieces += [Piece(value)] if isinstance(value, str) else value
        return pieces

    @cached_property
    def _parts(self) -> dict[str, list[Piece | str]]:
        """Per template its pieces, with the name of the value where one is to be filled in."""
        return {name: self._split(text) for name, text in self.templates.items()}

    def _split(self, text: str) -> list[Piece | str]:
        parts: list[Piece | str] = []
        for literal, slot, _, _ in string.Formatter().parse(text):
            if literal:
                parts.append(Piece(literal))
            if slot is not None:
                parts.append(self.token(slot) if slot in self.tokens else slot)
        return parts


def encoding_names() -> list[str]:
    """Names of the encodings that ship with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


@cache
def load_encoding(name: str) -> Encoding:
    """The encoding of that name; raises ConfigError with the nearest valid name."""
    return Encoding.resolve({**_read(name), "name": name}, f"encoding {name}")


def _read(name: str) -> dict[str, Any]:
    names = encoding_names()
    if name not in names:
        raise ConfigError(f"no encoding named {name!r}; {nearest(name, names)}")
    with resources.as_file(resources.files(__package__) / f"{name}.toml") as path:
        values = read_toml(path)
    base = values.pop("base", None)
    return {**_read(base), **values} if base else values
