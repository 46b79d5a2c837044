"""The ledger: one JSON object a line, appended as the run goes, the run's only record of numbers.

Every line has `kind` (`step`, `eval`, `event`) and `step`. A line is one write of whole bytes, and a write
that the disk cuts short is taken back, so that no reader meets half a line. On resume the lines past the
checkpoint are dropped (those steps are about to be run again) and an event says how many.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fullweight.core.errors import CheckpointError


class Ledger:
    """Append-only JSON lines at `path`. Only rank 0 may hold one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line; raises OSError when the disk refuses, leaving the earlier lines whole."""
        entry = {"kind": kind, "step": step, **_finite(values)}
        line = (json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                os.ftruncate(self._descriptor, before)
            raise

    def sync(self) -> None:
        """Force what was written to the disk: called beside each checkpoint."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger in order; a torn last line is left out. Raises CheckpointError on a bad line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"no ledger at {path}: not a run folder") from None
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise CheckpointError(f"{path}:{number}: damaged line {line[:60]!r}") from None
        yield entry


def rewind(path: Path, step: int) -> int:
    """Drop the lines of steps after `step` (and a torn last line); returns how many steps were dropped."""
    entries = list(read(path))
    kept = [e for e in entries if e["step"] <= step]
    dropped = sum(e["kind"] == "step" for e in entries) - sum(e["kind"] == "step" for e in kept)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(e, separators=(",", ":")) + "\n" for e in kept)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    return dropped


def _finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes its name, so that every reader parses every line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
