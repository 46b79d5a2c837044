"""The ledger: one JSON object a line, append-only for ever and hash-chained, the run's only record of numbers.

Every line has `kind` (`step`, `eval`, `event`), `step`, `time` (Unix seconds) and `previous`, the SHA-256 of the
bytes of the line before it, so that no line can be changed, left out or moved without changing all that follow.
A line is one write of whole bytes, and a write that the disk cuts short is taken back, so that no reader meets
half a line. A line that the disk refuses is held back and written, in order, once there is room; no checkpoint is
written before the lines up to it.

Nothing is ever removed. A run that goes back to a checkpoint appends an event `resume` with the step it went back
to, and earlier lines of later steps are from then on superseded (`superseded.py`). `read` gives the lines that
stand, `read_all` every line. Only the torn end of a killed write, which never was a line, is cut off (`mend`).

A checkpoint names the ledger's length and SHA-256 of all bytes up to there, so that it resumes only the run that
wrote it.

Left out: who wrote it. A chain shows that lines are unchanged, once somebody else knows a later line's hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fullweight.core import durable
from fullweight.core.errors import CheckpointError
from fullweight.core.ledger_head import LedgerHead
from fullweight.core.strict_json import parse_json
from fullweight.evidence.superseded import BEGINNINGS, Superseded

FORMAT = 2
GENESIS = "0" * 64
"""What the first line has as `previous`."""
MAX_LINE_BYTES = 64 << 20
"""Longer lines are refused before they fill a reader's memory; a step's line has a few thousand bytes."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line of a ledger."""

    number: int  # from 1
    raw: bytes  # without its newline
    entry: dict[str, Any]
    superseded: bool  # whether the run went back behind it later

    @property
    def sha256(self) -> str:
        """What the next line has as `previous`."""
        return hashlib.sha256(self.raw).hexdigest()


class Ledger:
    """Append-only JSON lines at `path`. Only rank 0 may hold one; its threads may share it.

    A ledger that is there already is continued; its end must be whole (`mend`). `clock` gives Unix seconds; the
    machine's `steady_clock` when absent.
    """

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self.path, self._clock = path, steady_clock() if clock is None else clock
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._hasher, self._size, self._lines, self._last, self.segments = hashlib.sha256(), 0, 0, GENESIS, 0
        with path.open("rb") as stream:
            for line in _whole_lines(stream, path):
                self._count(line)
                self.segments += _begins(line, path, self._lines) is not None
        assert self._size == os.fstat(self._descriptor).st_size, f"{path} ends in half a line"
        self._held: deque[bytes] = deque()
        self._lock = threading.Lock()
        durable.sync(path.parent)

    @property
    def held(self) -> int:
        """Lines that wait for room on the disk."""
        return len(self._held)

    def begin(self, what: str, step: int, values: dict[str, Any]) -> OSError | None:
        """Write the event that a segment begins with, `start` or `resume`, and its number, from 0."""
        assert what in BEGINNINGS, what
        self.segments += 1
        return self.append("event", step, {"what": what, "segment": self.segments - 1, **values})

    def append(self, kind: str, step: int, values: dict[str, Any]) -> OSError | None:
        """Write one line, after those held back; returns the disk's refusal, with which the line is held too."""
        with self._lock:
            chained = {"time": self._clock(), "previous": self._last}
            entry = {"kind": kind, "step": step, **chained, **finite(values)}
            line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode()
            self._count(line)
            self._held.append(line + b"\n")
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

    def _count(self, line: bytes) -> None:
        self._hasher.update(line + b"\n")
        self._size, self._lines = self._size + len(line) + 1, self._lines + 1
        self._last = hashlib.sha256(line).hexdigest()

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


def steady_clock(
    wall: Callable[[], float] = time.time, elapsed: Callable[[], float] | None = None
) -> Callable[[], float]:
    """Unix seconds that never go back: the wall clock as it is now, and from here on the time that passes.

    The wall clock may be set during a segment (NTP, an administrator), and times of lines would then tell neither
    how long a step took nor in what order things happened. So it is read once. What passes is told by the clock of
    the machine that nobody sets and that counts while the machine sleeps.
    """
    passing = _passing if elapsed is None else elapsed
    began, offset = passing(), wall()
    return lambda: offset + (passing() - began)


def _passing() -> float:
    awake_or_not = getattr(time, "CLOCK_BOOTTIME", None)  # Linux; elsewhere the monotonic clock is the nearest
    return time.monotonic() if awake_or_not is None else time.clock_gettime(awake_or_not)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that stand, in order: without superseded ones and a torn end.

    Raises CheckpointError on a bad line.
    """
    return (line.entry for line in read_all(path) if not line.superseded)


def read_all(path: Path) -> Iterator[Line]:
    """Every whole line in order. Raises CheckpointError on a bad one; the chain is not checked."""
    superseded = Superseded(_beginnings(path))
    with _opened(path) as stream:
        for number, raw in enumerate(_whole_lines(stream, path), 1):
            entry = _entry(raw, path, number)
            yield Line(number, raw, entry, superseded(number, entry["step"]))


def superseded_steps(path: Path, step: int) -> int:
    """How many steps that stand now are superseded when the run goes back to `step`."""
    return sum(entry["kind"] == "step" and entry["step"] > step for entry in read(path))


def mend(path: Path) -> None:
    """Cut off a torn end, durably. Raises CheckpointError when a line is damaged or the chain is broken."""
    size, last = 0, GENESIS
    for line in read_all(path):
        if line.entry.get("previous") != last:
            raise CheckpointError(
                f"{path}:{line.number}: the chain is broken: its `previous` is {line.entry.get('previous')!r}, "
                f"the line before it has {last}; a line was changed, removed or moved, or it is of a version "
                "whose ledgers had no chain. Restore the ledger that the run wrote"
            )
        size, last = size + len(line.raw) + 1, line.sha256
    if size != path.stat().st_size:
        os.truncate(path, size)
        durable.sync(path)


def not_under(path: Path, head: LedgerHead) -> str | None:
    """Why the ledger at `path` does not begin with the bytes that `head` stands for, or None when it does."""
    hasher, left = hashlib.sha256(), head.size_bytes
    try:
        with path.open("rb") as stream:
            while left and (block := stream.read(min(left, _BLOCK))):
                hasher.update(block)
                left -= len(block)
    except FileNotFoundError:
        return f"there is no ledger at {path}"
    if left:
        found = head.size_bytes - left
        return f"{path} has {found:,} bytes, it had {head.size_bytes:,} when the checkpoint was written"
    if hasher.hexdigest() != head.sha256:
        return f"{path} does not begin with the lines that were there when the checkpoint was written"
    return None


def _beginnings(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number, what, step) of every event with which a segment begins."""
    with _opened(path) as stream:
        for number, raw in enumerate(_whole_lines(stream, path), 1):
            entry = _begins(raw, path, number)
            if entry is not None:
                yield number, entry["what"], entry["step"]


def _begins(raw: bytes, path: Path, number: int) -> dict[str, Any] | None:
    """The entry of a line with which a segment begins. Most lines are told apart without being parsed."""
    if not any(f'"{what}"'.encode() in raw for what in BEGINNINGS):
        return None
    entry = _entry(raw, path, number)
    return entry if entry["kind"] == "event" and entry.get("what") in BEGINNINGS else None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise CheckpointError(f"no ledger at {path}: not a run folder") from None


def _whole_lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines that end, without their newlines."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if not line.endswith(b"\n"):
            if len(line) > MAX_LINE_BYTES:
                raise CheckpointError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes")
            return
        yield line[:-1]


def _entry(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = parse_json(raw)
        if not isinstance(entry, dict) or type(entry.get("step")) is not int or "kind" not in entry:
            raise ValueError("no line of a ledger")
    except ValueError:
        raise CheckpointError(f"{path}:{number}: damaged line {raw[:60]!r}") from None
    return entry


def finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes its name, so that every reader parses every line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
