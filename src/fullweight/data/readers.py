"""Rows of a data file, one at a time, each with the place that an error message names: one reader a kind of file.

JSON Lines, JSON, CSV and Parquet are read here, so that a mistake is told by file and line (row, for Parquet), a
number in a column of text stays the text that was written, and nothing is copied to another place. Everything else
goes through `datasets`: folders, its own saved form, names on the Hub, and files that it has a builder for.

Left out: guessing columns from the data, and JSON files larger than memory (a list is parsed as a whole; JSON
Lines are not).
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.parquet
from pydantic import model_validator

from fullweight.core.config import Config
from fullweight.core.errors import DataError
from fullweight.core.strict_json import parse_json
from fullweight.data.hub import reached_or_offline

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

_UTF8_BOM = b"\xef\xbb\xbf"
_OPTIONAL_COLUMNS = ("id", "tools", "answer", "task")
_JSON_COLUMNS = ("tools",)  # and the one of messages: JSON text in a file whose cells are text
_LONGEST_CELL = 2**31 - 1
_BUILDERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")


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


def read_rows(source: str, columns: Columns, split: str) -> Rows:
    """Rows of a file, a folder, or what `datasets` opens by this name.

    Raises DataError naming file and line (row) on: an absent file, a malformed, empty or non-UTF-8 line, and a
    file none of whose rows has a required column (with the columns found).
    """
    path = Path(source)
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or one that holds a zero byte
        raise DataError(f"no data file at {source[:80]!r}: {error}"[:300]) from None
    reader = _READERS.get(path.suffix)
    if reader is None:
        return _dataset_rows(source, columns, split, path if is_file else None)
    if not is_file:
        raise DataError(f"no data file at {path} (paths are relative to {Path.cwd()})")
    return reader(path, columns)


def missing_column(name: str, found: Sequence[str]) -> str:
    """What to say of a row or file without a required column."""
    if not found:
        return f"no column {name!r}; the row has no columns"
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.0)[0]
    return (
        f"no column {name!r}; columns found: {', '.join(found)} (nearest: {close!r}); "
        "say which to use with columns = { messages = ... }, { prompt = ..., answer = ... } or { text = ... }"
    )


def json_value(text: str | bytes, where: str) -> Any:
    """The value of a JSON text of a file; DataError names the place."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _jsonl_rows(path: Path, columns: Columns) -> Rows:
    with _opened(path), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = raw.removeprefix(_UTF8_BOM) if number == 1 else raw
            if not line.strip():
                raise DataError(f"{where}: empty line; every line must be one JSON object")
            yield where, _object(json_value(line.rstrip(), where), where)


def _json_rows(path: Path, columns: Columns) -> Rows:
    """A list of objects; or objects one a line, as JSON Lines are sometimes named."""
    with _opened(path):
        data = path.read_bytes().removeprefix(_UTF8_BOM)
    if not data.lstrip().startswith(b"["):
        yield from _jsonl_rows(path, columns)
        return
    for number, value in enumerate(json_value(data, str(path)), start=1):
        where = f"{path} row {number}"
        yield where, _object(value, where)


def _csv_rows(path: Path, columns: Columns) -> Rows:
    csv.field_size_limit(_LONGEST_CELL)
    with _opened(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            names = next(rows, [])
            if not names:
                raise DataError(f"{path}: its first line is empty; expected the names of the columns")
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: two columns have the same name; found {', '.join(names)}")
            _check_columns(path, columns, names)
            first = rows.line_num + 1
            for cells in rows:
                where, first = f"{path}:{first}", rows.line_num + 1
                if len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cells, expected {len(names)} ({', '.join(names)})")
                yield where, _typed(dict(zip(names, cells, strict=True)), columns, where)
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 after line {rows.line_num}; save the file as UTF-8") from None


def _typed(row: Row, columns: Columns, where: str) -> Row:
    """Cells that hold JSON parsed, and empty ones of optional columns left out."""
    kept = {name: cell for name, cell in row.items() if cell or name in columns.required()}
    holds_json = {*_JSON_COLUMNS, *(columns.required() if columns.prompt is None and columns.text is None else ())}
    return {
        name: json_value(cell, f"{where}: column {name!r}") if name in holds_json and cell else cell
        for name, cell in kept.items()
    }


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        found = file.schema_arrow.names
        _check_columns(path, columns, found)
        wanted = [n for n in dict.fromkeys((*columns.required(), *columns.optional())) if n in found]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _prune(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _dataset_rows(source: str, columns: Columns, split: str, file: Path | None) -> Rows:
    opened = _opened_dataset(source, split, file)
    _check_columns(source, columns, opened.column_names)
    kept = [n for n in opened.column_names if n in (*columns.required(), *columns.optional())]
    for number, row in enumerate(opened.select_columns(kept), start=1):
        yield f"{source} row {number}", _prune(row)


def _opened_dataset(source: str, split: str, file: Path | None) -> Any:
    import datasets  # noqa: PLC0415 (takes over a second; only this kind of source needs it)

    offline: str | None = None
    try:
        if file is not None:
            builder = _builder(file)
            opened = datasets.load_dataset(builder, data_files=source, split="train")
        elif (Path(source) / "state.json").is_file():
            opened = datasets.load_from_disk(source)
        else:
            with reached_or_offline() as offline:
                opened = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{source!r} is no file that is read here ({', '.join(_READERS)}), and `datasets` cannot open it "
            f"(split {split!r}): {_reason(error)}"
            + (f" (no connection to {offline}; no copy is in the cache)" if offline else "")
        ) from None
    return opened


def fingerprint(source: str, split: str) -> dict[str, Any]:
    """What `datasets` knows a data set by that it fetched from elsewhere. Raises DataError when it has none."""
    opened = _opened_dataset(source, split, None)
    return {"split": split, "fingerprint": opened._fingerprint, "version": str(opened.version)}


def _builder(file: Path) -> str:
    """Name of the builder that `datasets` has for a file."""
    name = file.with_suffix("") if file.suffix in _COMPRESSED else file
    if name.suffix not in _BUILDERS:
        known = ", ".join(dict.fromkeys((*_READERS, *_BUILDERS)))
        raise DataError(
            f"{file}: unknown kind of data file {file.suffix!r}; expected {known}, packed as "
            f"{', '.join(_COMPRESSED)} or not, or a folder"
        )
    return _BUILDERS[name.suffix]


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: `datasets` wraps it in words that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _opened(path: Path) -> Iterator[None]:
    """The operating system's refusal to read a file, as a message about data."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _check_columns(path: object, columns: Columns, found: Sequence[str]) -> None:
    for name in columns.required():
        if name not in found:
            raise DataError(f"{path}: {missing_column(name, found)}")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _prune(value: Any) -> Any:
    """Drop None-valued keys, recursively: columnar files give every struct the union of all keys."""
    if isinstance(value, dict):
        return {k: _prune(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_prune(v) for v in value]
    return value


_READERS: dict[str, Callable[[Path, Columns], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
