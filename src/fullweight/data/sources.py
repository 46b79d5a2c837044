"""Where samples come from: data files, anything `datasets` opens, or generated tasks.

A sample is a dict with "messages" (and optionally "tools", "id", "answer", "task") or {"text": str}. A source
yields `Record`s in file order, one at a time, each with the place that an error message names. Nothing is
guessed from the data: which columns hold what is said in `Columns`.

Two digests are taken of what a sample *says*, never of its order or id: `content_digest` of the whole (equal
means the same sample), and `question_digest` of what comes before the first answer, by which the held-out
split is made: two answers to one question fall on the same side.

Files are opened by `readers.py`. Left out: sources that cannot be read twice (streams).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fullweight.core.config import Config
from fullweight.core.errors import DataError
from fullweight.data.encoding.conversation import content_text
from fullweight.data.readers import Columns, json_value, missing_column, read_rows
from fullweight.data.synth import SynthConfig, generate

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


class FileSource(Config):
    """A data file (relative to the working folder), or what `datasets` opens by this name."""

    kind: Literal["file"]
    path: str = Field(min_length=1)
    columns: Columns = Columns()
    system: str | None = Field(None, description="system text put before the prompt of prompt/answer columns")
    split: str = Field("train", description="split of a folder or name that `datasets` opens")
    weight: float | None = Field(None, gt=0, description="relative share of the samples of an epoch")

    @model_validator(mode="after")
    def _system_needs_prompt(self) -> Self:
        if self.system is not None and self.columns.prompt is None:
            raise ValueError("system goes with prompt and answer columns; put it in the messages instead")
        return self

    @property
    def name(self) -> str:
        """How reports call the source."""
        return self.path


class SynthSource(Config):
    """Generated, verified tasks."""

    kind: Literal["synth"]
    synth: SynthConfig
    weight: float | None = Field(None, gt=0, description="relative share of the samples of an epoch")

    @property
    def name(self) -> str:
        """How reports call the source."""
        return f"synth (seed {self.synth.seed})"


SourceConfig = Annotated[FileSource | SynthSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class Record:
    """A sample, its place ('file:line') and the hex digest of its content."""

    sample: dict[str, Any]
    where: str
    digest: str


def read(source: FileSource | SynthSource) -> Iterator[Record]:
    """Every sample of a source in its order, each with an "id" (its own, or else from its content).

    Raises DataError naming the file and line (row) on: an absent or empty source, a malformed, empty or
    non-UTF-8 line, a missing column (with the columns found) or a column of the wrong type.
    """
    if isinstance(source, SynthSource):
        rows = ((f"{source.name} sample {i}", s) for i, s in enumerate(generate(source.synth)))
        return _records(rows, Columns(), None, source.name)
    rows_read = read_rows(source.path, source.columns, source.split)
    return _records(rows_read, source.columns, source.system, source.name)


def content_digest(sample: dict[str, Any]) -> str:
    """Hex digest of what the model is shown: messages and tools, or the text; not id, answer or task."""
    return _digest([sample.get("messages"), sample.get("tools"), sample.get("text")])


def question_digest(sample: dict[str, Any]) -> str:
    """Hex digest of what is asked: roles and contents before the first answer, without the system text.

    A sample that asks nothing (plain text, or an answer first) is its own question.
    """
    asked = []
    for message in sample.get("messages", ()):
        if message.get("role") == "assistant":
            break
        if message.get("role") != "system":
            asked.append([message.get("role"), message.get("content")])
    return _digest(asked) if asked else content_digest(sample)


def _digest(value: Any) -> str:
    # what JSON cannot hold (a date, bytes) is either in a key that the encoding ignores or refused by it
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _records(
    rows: Iterable[tuple[str, dict[str, Any]]], columns: Columns, system: str | None, name: str
) -> Iterator[Record]:
    empty = True
    for where, row in rows:
        empty = False
        sample = _sample(row, columns, system, where)
        try:
            digest = content_digest(sample)
            "".join(str(sample.get(name)) for name in ("id", "answer", "task")).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: text with half of a surrogate pair, which is no character") from None
        sample.setdefault("id", digest)
        yield Record(sample, where, digest)
    if empty:
        raise DataError(f"{name} is empty; expected at least one sample")


def _sample(row: dict[str, Any], columns: Columns, system: str | None, where: str) -> dict[str, Any]:
    for name in columns.required():
        if name not in row:
            raise DataError(f"{where}: {missing_column(name, list(row))}")
    sample: dict[str, Any] = {k: row[k] for k in columns.optional() if row.get(k) is not None}
    if "id" in sample:
        sample["id"] = str(sample["id"])
    if isinstance(sample.get("tools"), str):
        sample["tools"] = json_value(sample["tools"], f"{where}: column 'tools'")
    if columns.text is not None:
        sample["text"] = _text(row, columns.text, where)
    elif columns.prompt is not None and columns.answer is not None:
        prompt, answer = _text(row, columns.prompt, where), _text(row, columns.answer, where)
        opening = [] if system is None else [{"role": "system", "content": system}]
        sample["messages"] = [*opening, {"role": "user", "content": prompt}, _answer_message(answer)]
    else:
        sample["messages"] = _messages(row[columns.required()[0]], columns.required()[0], where)
    return sample


def _answer_message(answer: str) -> dict[str, Any]:
    if answer.startswith(_THINK_OPEN) and _THINK_CLOSE in answer:
        reasoning, _, content = answer.removeprefix(_THINK_OPEN).partition(_THINK_CLOSE)
        return {"role": "assistant", "reasoning_content": reasoning, "content": content}
    return {"role": "assistant", "content": answer}


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value:
        found = "an empty string" if value == "" else type(value).__name__
        raise DataError(f"{where}: column {column!r} must be a non-empty string, found {found}")
    return value


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(
            f"{where}: column {column!r} must be a list of messages with role and content, found {found}"
        )
    for index, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            raise DataError(f"{where}: {column}[{index}] has no role; found keys {sorted(map(str, message))}")
    return [_flat(message, f"{where}: {column}[{index}]") for index, message in enumerate(value)]


def _flat(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with text blocks joined: what is said, by which samples are compared, is then a string."""
    content = message.get("content")
    return {**message, "content": content_text(content, where)} if isinstance(content, list) else message
