"""The ledger survives torn writes, full disks and resumed steps."""

import errno
import json
import os
from pathlib import Path

import pytest

from fullweight.core.errors import CheckpointError
from fullweight.train import ledger
from fullweight.train.ledger import Ledger


def _write(path: Path, steps: range) -> None:
    log = Ledger(path)
    for step in steps:
        log.append("step", step, {"loss": {"lm": 1.0 / step}})
    log.close()


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """Each append is one line of JSON."""
    _write(tmp_path / "l.jsonl", range(1, 4))
    assert [e["step"] for e in ledger.read(tmp_path / "l.jsonl")] == [1, 2, 3]


def test_numbers_that_json_lacks_stay_readable(tmp_path: Path) -> None:
    """A skipped step's NaN must not make the line unreadable for strict parsers."""
    log = Ledger(tmp_path / "l.jsonl")
    log.append("step", 1, {"loss": {"lm": float("nan")}, "all": [float("inf"), 1.5]})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "l.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"]["lm"] == "nan"
    assert line["all"] == ["inf", 1.5]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    """The process may die inside a write; what was whole before still reads."""
    path = tmp_path / "l.jsonl"
    _write(path, range(1, 3))
    with path.open("ab") as stream:
        stream.write(b'{"kind":"step","st')
    assert [e["step"] for e in ledger.read(path)] == [1, 2]
    assert ledger.rewind(path, 2) == 0
    assert path.read_bytes().endswith(b"\n")


def test_rewind_drops_later_steps_and_counts_them(tmp_path: Path) -> None:
    """After a resume no step may appear twice."""
    path = tmp_path / "l.jsonl"
    _write(path, range(1, 8))
    assert ledger.rewind(path, 4) == 3
    _write(path, range(5, 8))
    assert [e["step"] for e in ledger.read(path)] == list(range(1, 8))


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    """Corruption is told, not skipped."""
    path = tmp_path / "l.jsonl"
    path.write_text('{"kind":"step","step":1}\n{"kind":"st\n{"kind":"step","step":3}\n')
    with pytest.raises(CheckpointError, match=r"l\.jsonl:2"):
        list(ledger.read(path))


def test_lines_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, or cut in the middle of a write: nothing of it stays; with room again all are there, in order.

    The head counts lines that wait, and `sync`, which a checkpoint calls first, does not let them wait.
    """
    path = tmp_path / "l.jsonl"
    log, write, room = Ledger(path), os.write, [30]

    def short(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", short)
    refusals = [log.append("step", step, {}) for step in (1, 2, 3)]
    assert refusals[0] is None
    assert [r is not None and "No space left" in str(r) for r in refusals[1:]] == [True, True]
    assert path.read_bytes() == b'{"kind":"step","step":1}\n'
    assert (log.held, log.head().num_lines) == (2, 3)
    with pytest.raises(OSError, match=r"No space left on device.*l\.jsonl"):
        log.sync()
    room[0] = 10**6
    assert log.append("step", 4, {}) is None
    assert [e["step"] for e in ledger.read(path)] == [1, 2, 3, 4]
    assert ledger.not_under(path, log.head()) is None
    log.sync()
    log.close()
