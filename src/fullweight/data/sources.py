"""Where samples come from: JSON Lines, Parquet, anything `datasets` opens, or generated tasks.

A sample is a dict with "messages" (and optionally "tools", "id", "answer", "task") or {"text": str}. A source
yields `Record`s in file order, one at a time, each with the place that an error message names. Nothing is
guessed from the data: which columns hold what is said in `Columns`.

Two digests are taken of what a sample *says*, never of its order or id: `content_digest` of the whole (equal
means the same sample), and `question_digest` of what comes before the first answer, by which the held-out
split is made: two answers to one question fall on the same side.

Left out: sources that cannot be read twice (streams), and compressed JSON Lines.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow
import pyarrow.parquet
from pydantic import Field, model_validator

from fullweight.core.config import Config
from fullweight.core.errors import DataError
from fullweight.data.encoding.conversation import content_text
from fullweight.data.synth import SynthConfig, generate

_UTF8_BOM = b"\xef\xbb\xbf"
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_OPTIONAL_COLUMNS = ("id", "tools", "answer", "task")


class Columns(Config):
    """Which columns of a file hold the sample; with none named, `messages`.

    `prompt` and `answer` make a two-message conversation. An answer that starts with `<think>...</think>`
    is split there: the inside is the reasoning, what follows is the content, both kept to the letter.
    """

    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer columns go together; name both")
        layouts = [k for k in ("messages", "prompt", "text") if getattr(self, k) is not None]
        if len(layouts) > 1:
            raise ValueError(f"name messages, or prompt and answer, or text; found {' and '.join(layouts)}")
        return self

    def required(self) -> tuple[str, ...]:
        """Names of the columns that every row must have."""
        if self.prompt is not None and self.answer is not None:
            return (self.prompt, self.answer)
        return (self.text or self.messages or "messages",)

    def optional(self) -> tuple[str, ...]:
        """Names of the columns read where a row has them; prompt/answer and text rows: only the id."""
        return _OPTIONAL_COLUMNS if self.prompt is None and self.text is None else ("id",)


class FileSource(Config):
    """A .jsonl or .parquet file (relative to the working folder), or what `datasets` opens by this name."""

    kind: Literal["file"]
    path: str
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
    rows: Iterable[tuple[str, dict[str, Any]]]
    if isinstance(source, SynthSource):
        rows = ((f"{source.name} sample {i}", s) for i, s in enumerate(generate(source.synth)))
        return _records(rows, Columns(), None, source.name)
    path = Path(source.path)
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise DataError(f"no data file at {path} (paths are relative to {Path.cwd()})")
    if path.suffix == ".jsonl":
        rows = _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, source.columns)
    elif path.is_file():
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; expected .jsonl or .parquet")
    else:
        rows = _dataset_rows(source)
    return _records(rows, source.columns, source.system, source.name)


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
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
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
        except UnicodeEncodeError:
            raise DataError(f"{where}: text with half of a surrogate pair, which is no character") from None
        sample.setdefault("id", digest)
        yield Record(sample, where, digest)
    if empty:
        raise DataError(f"{name} is empty; expected at least one sample")


def _sample(row: dict[str, Any], columns: Columns, system: str | None, where: str) -> dict[str, Any]:
    for name in columns.required():
        if name not in row:
            raise DataError(f"{where}: {_missing(name, list(row))}")
    sample: dict[str, Any] = {k: row[k] for k in columns.optional() if row.get(k) is not None}
    if "id" in sample:
        sample["id"] = str(sample["id"])
    if isinstance(sample.get("tools"), str):
        sample["tools"] = _json(sample["tools"].encode(), f"{where}: column 'tools'")
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


def _missing(name: str, found: Sequence[str]) -> str:
    if not found:
        return f"no column {name!r}; the row has no columns"
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.0)[0]
    return (
        f"no column {name!r}; columns found: {', '.join(found)} (nearest: {close!r}); "
        "say which to use with columns = { messages = ... }, { prompt = ..., answer = ... } or { text = ... }"
    )


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = raw.removeprefix(_UTF8_BOM) if number == 1 else raw
            if not line.strip():
                raise DataError(f"{where}: empty line; every line must be one JSON object")
            row = _json(line, where)
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        found = file.schema_arrow.names
        for name in columns.required():
            if name not in found:
                raise DataError(f"{path}: {_missing(name, found)}")
        wanted = [n for n in dict.fromkeys((*columns.required(), *columns.optional())) if n in found]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _prune(row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _dataset_rows(source: FileSource) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # noqa: PLC0415 (takes over a second; only this kind of source needs it)

    path = Path(source.path)
    try:
        if (path / "state.json").is_file():
            opened = datasets.load_from_disk(source.path)
        else:
            opened = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.path!r} is no .jsonl or .parquet file, and `datasets` cannot open it "
            f"(split {source.split!r}): {reason}"
        ) from None
    for name in source.columns.required():
        if name not in opened.column_names:
            raise DataError(f"{source.path}: {_missing(name, opened.column_names)}")
    kept = [n for n in opened.column_names if n in (*source.columns.required(), *source.columns.optional())]
    for number, row in enumerate(opened.select_columns(kept), start=1):
        yield f"{source.path} row {number}", _prune(row)


def _prune(value: Any) -> Any:
    """Drop None-valued keys, recursively: columnar files give every struct the union of all keys."""
    if isinstance(value, dict):
        return {k: _prune(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_prune(v) for v in value]
    return value
