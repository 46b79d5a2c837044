"""The ledger survives torn writes, full disks and resumed steps, and shows every change of a line."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from fullweight.core.errors import CheckpointError
from fullweight.evidence import ledger
from fullweight.evidence.ledger import GENESIS, Ledger, steady_clock


def _write(path: Path, steps: range) -> None:
    log = Ledger(path)
    for step in steps:
        log.append("step", step, {"loss": {"lm": 1.0 / step}})
    log.close()


def _resume(path: Path, step: int) -> None:
    log = Ledger(path)
    log.begin("resume", step, {"generation": f"step-{step}"})
    log.close()


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """Each append is one line of JSON."""
    _write(tmp_path / "l.jsonl", range(1, 4))
    assert [e["step"] for e in ledger.read(tmp_path / "l.jsonl")] == [1, 2, 3]


def test_each_line_holds_the_hash_of_the_one_before(tmp_path: Path) -> None:
    """As anybody can recompute with sha256sum, also when reopened; and the time of writing."""
    path, times = tmp_path / "l.jsonl", iter([10.25, 11.5, 9.0])
    for steps in ((1, 2), (3,)):
        log = Ledger(path, lambda: next(times))
        for step in steps:
            log.append("step", step, {"text": "ü"})
        log.close()
    first, second, third = path.read_bytes().splitlines()
    assert json.loads(first)["previous"] == GENESIS == "0" * 64
    assert json.loads(second)["previous"] == hashlib.sha256(first).hexdigest()
    assert json.loads(third)["previous"] == hashlib.sha256(second).hexdigest()
    assert [json.loads(line)["time"] for line in (first, second, third)] == [10.25, 11.5, 9.0]
    assert [line.raw for line in ledger.read_all(path)] == [first, second, third]
    assert next(line.sha256 for line in ledger.read_all(path)) == json.loads(second)["previous"]


@pytest.mark.parametrize("harm", ["edited", "removed", "moved"])
def test_a_changed_line_is_refused_at_the_one_after_it(harm: str, tmp_path: Path) -> None:
    """Nothing is written behind a chain that does not hold."""
    path = tmp_path / "l.jsonl"
    _write(path, range(1, 6))
    lines = path.read_bytes().splitlines(keepends=True)
    if harm == "edited":
        lines[2] = lines[2].replace(b"0.33", b"0.32")
    elif harm == "removed":
        del lines[2]
    else:
        lines[2], lines[3] = lines[3], lines[2]
    path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=rf"l\.jsonl:{4 if harm == 'edited' else 3}: the chain is broken"):
        ledger.mend(path)
    assert path.read_bytes() == b"".join(lines)


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


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    """The process may die inside a write; what was whole before still reads, and is what the next line follows."""
    path = tmp_path / "l.jsonl"
    _write(path, range(1, 3))
    whole = path.read_bytes()
    with path.open("ab") as stream:
        stream.write(b'{"kind":"step","st')
    assert [e["step"] for e in ledger.read(path)] == [1, 2]
    ledger.mend(path)
    assert path.read_bytes() == whole
    _write(path, range(3, 4))
    ledger.mend(path)
    assert path.read_bytes().startswith(whole)


def test_a_resume_supersedes_later_steps_and_removes_nothing(tmp_path: Path) -> None:
    """Of the lines that stand no step appears twice; the others can still be seen, and the chain runs through."""
    path = tmp_path / "l.jsonl"
    _write(path, range(1, 8))
    before = path.read_bytes()
    assert ledger.superseded_steps(path, 4) == 3
    _resume(path, 4)
    _write(path, range(5, 7))
    _resume(path, 5)
    _write(path, range(6, 8))
    assert path.read_bytes().startswith(before)
    entries = list(ledger.read(path))
    assert [e["step"] for e in entries if e["kind"] == "step"] == list(range(1, 8))
    assert [(e["step"], e["segment"]) for e in entries if e["kind"] == "event"] == [(4, 0), (5, 1)]
    numbers = [line.number for line in ledger.read_all(path) if line.superseded]
    assert numbers == [5, 6, 7, 10]
    ledger.mend(path)


def test_a_second_start_supersedes_everything(tmp_path: Path) -> None:
    """A run that came to no checkpoint begins again, also with what it recorded before its first step."""
    path = tmp_path / "l.jsonl"
    for _ in range(2):
        log = Ledger(path)
        log.begin("start", 0, {})
        log.append("eval", 0, {"note": "start"})
        log.close()
    live = [(e["kind"], e.get("segment")) for e in ledger.read(path)]
    assert live == [("event", 1), ("eval", None)]
    assert [line.superseded for line in ledger.read_all(path)] == [True, True, False, False]


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    """Corruption is told, not skipped."""
    path = tmp_path / "l.jsonl"
    path.write_text('{"kind":"step","step":1}\n{"kind":"st\n{"kind":"step","step":3}\n')
    with pytest.raises(CheckpointError, match=r"l\.jsonl:2"):
        list(ledger.read(path))


def test_a_line_that_fills_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "l.jsonl"
    path.write_text('{"kind":"step","step":1}\n{"kind":"' + "x" * 1000 + '","step":2}\n')
    with pytest.raises(CheckpointError, match=r"l\.jsonl:2: a line of more than 1,000 bytes"):
        list(ledger.read(path))


def test_lines_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, or cut in the middle of a write: nothing of it stays; with room again all are there, in order.

    The head counts lines that wait, the chain runs over them, and `sync`, which a checkpoint calls first, does not
    let them wait.
    """
    path = tmp_path / "l.jsonl"
    log, write, room = Ledger(path), os.write, [150]

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
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1]
    assert path.read_bytes().endswith(b"\n")
    assert (log.held, log.head().num_lines) == (2, 3)
    with pytest.raises(OSError, match=r"No space left on device.*l\.jsonl"):
        log.sync()
    room[0] = 10**6
    assert log.append("step", 4, {}) is None
    assert [e["step"] for e in ledger.read(path)] == [1, 2, 3, 4]
    ledger.mend(path)
    assert ledger.not_under(path, log.head()) is None
    log.sync()
    log.close()


def test_times_follow_a_clock_that_cannot_be_set(tmp_path: Path) -> None:
    """The wall clock goes back an hour after the first line; the lines go on by what passed, and say the order."""
    wall, passed = [1e9], [50.0]
    clock = steady_clock(lambda: wall[0], lambda: passed[0])
    log = Ledger(tmp_path / "l.jsonl", clock)
    log.append("event", 0, {"what": "start"})
    wall[0], passed[0] = 1e9 - 3600, 53.5
    log.append("event", 0, {"what": "finish"})
    log.close()
    assert [entry["time"] for entry in ledger.read(tmp_path / "l.jsonl")] == [1e9, 1e9 + 3.5]
