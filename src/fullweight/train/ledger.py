"""The ledger: one JSON object a line, appended as the run goes, the run's only record of numbers.

Every line has `kind` (`step`, `eval`, `event`) and `step`. A line is one write of whole bytes, and a write
that the disk cuts short is taken back, so that no reader meets half a line. A line that the disk refuses is held
back and written, in order, once there is room; no checkpoint is written before the lines up to it. On resume the
lines past the checkpoint are dropped (those steps are about to be run again) and an event says how many.

A checkpoint names the ledger's head, length and SHA-256 of all bytes up to there, so that it resumes only the run
that wrote it. Rewinding keeps the lines' bytes, hence every earlier head.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fullweight.checkpoint.manifest import LedgerHead
from fullweight.core import durable
from fullweight.core.errors import CheckpointError
from fullweight.core.strict_json import parse_json


class Ledger:
    """Append-only JSON lines at `path`. Only rank 0 may hold one; its threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        there = path.read_bytes() if path.is_file() else b""
        self._hasher, self._size, self._lines = hashlib.sha256(there), len(there), there.count(b"\n")
        self._held: deque[bytes] = deque()
        self._lock = threading.Lock()
        durable.sync(path.parent)

    @property
    def held(self) -> int:
        """Lines that wait for room on the disk."""
        return len(self._held)

    def append(self, kind: str, step: int, values: dict[str, Any]) -> OSError | None:
        """Write one line, after those held back; returns the disk's refusal, with which the line is held too."""
        entry = {"kind": kind, "step": step, **_finite(values)}
        line = (json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n").encode()
        with self._lock:
            self._hasher.update(line)
            self._size, self._lines = self._size + len(line), self._lines + 1
            self._held.append(line)
            try:
                self._write_held()
            except OSError as error:
                return error
        return None

    def head(self) -> LedgerHead:
        """What was appended so far; `sync` makes sure that it is on the disk."""
        with self._lock:
            return LedgerHead(size_bytes=self._size, num_lines=self._lines, sha256=self._hasher.hexdigest())

    def sync(self) -> None:
        """Write what is held back and force all of it to the disk; raises OSError when the disk refuses."""
        with self._lock:
            self._write_held()
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write_held(self) -> None:
        while self._held:
            line = self._held[0]
            before, written = os.fstat(self._descriptor).st_size, 0
            try:
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError as error:
                if written:
                    os.ftruncate(self._descriptor, before)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self._held.popleft()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger in order; a torn last line is left out. Raises CheckpointError on a bad line."""
    return (entry for _, entry in _lines(path))


def rewind(path: Path, step: int) -> int:
    """Drop the lines of steps after `step` (and a torn last line); returns how many steps were dropped."""
    lines = list(_lines(path))
    kept = [(line, entry) for line, entry in lines if entry["step"] <= step]
    dropped = sum(e["kind"] == "step" for _, e in lines) - sum(e["kind"] == "step" for _, e in kept)
    content = b"".join(line + b"\n" for line, _ in kept)
    if len(content) != path.stat().st_size:
        durable.write(path, content)
    return dropped


def not_under(path: Path, head: LedgerHead) -> str | None:
    """Why the ledger at `path` does not begin with the bytes that `head` stands for, or None when it does."""
    try:
        with path.open("rb") as stream:
            found = stream.read(head.size_bytes)
    except FileNotFoundError:
        return f"there is no ledger at {path}"
    if len(found) < head.size_bytes:
        return f"{path} has {len(found):,} bytes, it had {head.size_bytes:,} when the checkpoint was written"
    if hashlib.sha256(found).hexdigest() != head.sha256:
        return f"{path} does not begin with the lines that were there when the checkpoint was written"
    return None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"no ledger at {path}: not a run folder") from None
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or "kind" not in entry:
                raise ValueError("no line of a ledger")
        except ValueError:
            raise CheckpointError(f"{path}:{number}: damaged line {line[:60]!r}") from None
        yield line, entry


def _finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes its name, so that every reader parses every line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
