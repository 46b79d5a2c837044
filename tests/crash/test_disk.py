"""A disk that fills up or refuses writes: the run stops with a reason, and goes on once there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.crash.conftest import Whole
from tests.crash.runs import RECIPE, SETTINGS, assert_same_in_the_end, lines, resume, train
from tests.processes import Ended, fullweight

from fullweight.checkpoint import store
from fullweight.checkpoint.generations import choose
from fullweight.cli.main import main
from fullweight.evidence.ledger import Ledger

pytestmark = pytest.mark.crash


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system in memory of that size; skips where this user may not mount."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used_kilobytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


def main_that_expects_room(arguments: list[str]) -> int:
    """The command line on a disk whose free space looks endless, such as behind a quota."""
    store.free_bytes = lambda folder: 1 << 60
    return main(arguments)


def main_on_a_disk_that_fails_once(arguments: list[str]) -> int:
    """The command line on a disk that has no room at the first look."""
    free, looks = store.free_bytes, [0]

    def none_at_first(folder: Path) -> int:
        looks[0] += 1
        return 0 if looks[0] == 1 else free(folder)

    store.free_bytes = none_at_first
    return main(arguments)


def main_while_the_disk_fills(arguments: list[str]) -> int:
    """The command line while another program takes every byte at step 3, and with FREES=1 gives them back.

    It gives them back when step 4 was tried to be saved once.
    """
    append, save = Ledger.append, store.save
    filler = Path(os.environ["DISK"]) / "filler"
    tries = [0]

    def fill_at_step_3(log: Ledger, kind: str, step: int, values: dict[str, Any]) -> OSError | None:
        if (kind, step) == ("step", 3):
            fill(filler)
            values = {**values, "padding": "x" * 8192}  # no rest of a page has room for it
        return append(log, kind, step, values)

    def free_after_a_failure(*given: Any, **options: Any) -> store.Saved:
        tries[0] += filler.exists()
        if tries[0] == 2 and filler.exists() and os.environ["FREES"] == "1":
            filler.unlink()
        return save(*given, **options)

    Ledger.append = fill_at_step_3  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == "0":
        store.save = free_after_a_failure
    return main(arguments)


def fill(filler: Path) -> None:
    """Take what is free, to the last byte."""
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue


def stopped_at_step_4(folder: Path, ranks: int) -> None:
    """A run with one checkpoint, of step 2, and a second one, of step 4, newest."""
    assert not train(folder, ranks, "save.begin save=3").ok
    assert choose(folder / "checkpoints").generation.step == 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("known", "free_kilobytes"),
    [(True, 0), (True, 4000), (False, 0), (False, 40), (False, 1000), (False, 4000)],
)
def test_a_full_disk_stops_the_run_and_harms_nothing(
    known: bool, free_kilobytes: int, ranks: int, tmp_path: Path, whole: Whole
) -> None:
    """At several sizes, seen before writing or met while writing; then, with room again, the same bits."""
    with mounted(tmp_path / "disk", 64) as disk:
        folder = disk / "run"
        stopped_at_step_4(folder, ranks)
        remount(disk, f"size={used_kilobytes(disk) + free_kilobytes}k")
        ended = run_resume(folder, ranks, known)
        assert all(status == 1 for status in ended.statuses), ended.output
        assert "Traceback" not in ended.output
        if known and free_kilobytes:
            assert "checkpoint failed (attempt 1 of 2)" in ended.output
            assert "2 attempts in a row to save step 6 failed" in ended.output
            assert "MB are needed" in ended.output
            events = [e["what"] for e in lines(folder, "event")]
            assert events.count("checkpoint_failed") == 2
        else:  # shards, or the ledger beside them, meet the end of the disk
            assert "No space left on device" in ended.output
        assert choose(folder / "checkpoints").generation.step == 4
        remount(disk, "size=64m")
        again = resume(folder, ranks)
        assert again.ok, again.output
        assert_same_in_the_end(folder, whole(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("frees", [True, False])
def test_a_disk_that_fills_between_two_saves(frees: bool, ranks: int, tmp_path: Path, whole: Whole) -> None:
    """Lines of the ledger wait. With room again none is lost; without, the run ends with its last good state."""
    with mounted(tmp_path / "disk", 64) as disk:
        folder = disk / "run"
        settings = [*SETTINGS, "checkpoint.asynchronous=false"]  # so that step 2 is saved when step 3 begins
        chosen = [part for setting in settings for part in ("--set", setting)]
        environment = {"DISK": str(disk), "FREES": str(int(frees))}
        call = f"{__name__}:main_while_the_disk_fills"
        ended = fullweight(
            "train", RECIPE, *chosen, "--output", folder, ranks=ranks, environment=environment, call=call
        )
        assert "lines of the ledger are held back" in ended.output
        assert "checkpoint failed (attempt 1 of 2)" in ended.output
        assert "Traceback" not in ended.output
        if frees:
            assert ended.ok, ended.output
            assert "every line that was held back is in the ledger" in ended.output
            [failed] = [e for e in lines(folder, "event") if e["what"] == "checkpoint_failed"]
            assert (failed["saving"], failed["attempt"]) == (4, 1)
        else:
            assert all(status == 1 for status in ended.statuses), ended.output
            assert "2 attempts in a row to save step 4 failed" in ended.output
            assert [e["step"] for e in lines(folder)] == [1, 2]
            assert choose(folder / "checkpoints").generation.step == 2
            (disk / "filler").unlink()
            again = resume(folder, ranks)
            assert again.ok, again.output
        assert_same_in_the_end(folder, whole(ranks))


def run_resume(folder: Path, ranks: int, known: bool) -> Ended:
    call = "fullweight.cli.main:main" if known else f"{__name__}:main_that_expects_room"
    return fullweight("resume", folder, ranks=ranks, call=call)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_read_only_disk_is_said(ranks: int, tmp_path: Path, whole: Whole) -> None:
    """Before any work; the run continues when it can be written again."""
    with mounted(tmp_path / "disk", 64) as disk:
        folder = disk / "run"
        stopped_at_step_4(folder, ranks)
        remount(disk, "ro")
        ended = resume(folder, ranks)
        assert all(status == 1 for status in ended.statuses), ended.output
        assert "Read-only file system" in ended.output
        assert "Traceback" not in ended.output
        remount(disk, "rw")
        assert resume(folder, ranks).ok
        assert_same_in_the_end(folder, whole(ranks))


def test_a_disk_that_recovers_loses_nothing(tmp_path: Path, whole: Whole) -> None:
    """One failed attempt, then room: the same step is saved at the second, and the run never stopped."""
    folder = tmp_path / "run"
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    call = f"{__name__}:main_on_a_disk_that_fails_once"
    ended = fullweight("train", RECIPE, *chosen, "--output", folder, call=call)
    assert ended.ok, ended.output
    events = [e for e in lines(folder, "event") if e["what"] in ("checkpoint_failed", "checkpoint")]
    assert [e["what"] for e in events[:2]] == ["checkpoint_failed", "checkpoint"]
    assert events[1]["generation"] == "step-2"
    assert_same_in_the_end(folder, whole(1))
