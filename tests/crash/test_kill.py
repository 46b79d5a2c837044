"""kill -9 at every point of saving, loading and exporting: nothing is lost, nothing loads wrong.

After each kill a plain `fullweight resume` continues to the very bits of a run that nothing interrupted. Each case
checks that the process really died at its point.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from tests.crash.conftest import Whole
from tests.crash.runs import assert_same_in_the_end, lines, resume, train

from fullweight.checkpoint.generations import choose
from fullweight.core.crash import POINTS

# (ranks, rank that dies)
WHO = [(1, 0), (2, 0), (2, 1)]
# In the third save two generations are there; the shard is torn after its hundredth write; training is a few steps
# further when the flush dies.
SAVING = {
    "save.begin": "save=3",
    "save.shard": "save=3 nth=100",
    "save.manifest": "save=3",
    "save.rename": "save=3",
    "save.pointer": "save=3",
    "save.retention": "save=3",
    "save.flush": "nth=3 delay=0.3",
    "train.step": "nth=8",
}
ONLY_MAIN = {"save.retention"}
CASES = [
    pytest.param(point, ranks, rank, id=f"{point}-{ranks}ranks-rank{rank}")
    for point in SAVING
    for ranks, rank in WHO
    if not (rank and point in ONLY_MAIN)
]


def killed(statuses: tuple[int, ...], rank: int) -> bool:
    return statuses[rank] == -signal.SIGKILL


@pytest.mark.crash
@pytest.mark.parametrize(("point", "ranks", "rank"), CASES)
def test_killed_while_saving(point: str, ranks: int, rank: int, tmp_path: Path, whole: Whole) -> None:
    """The state of the last finished save is there and intact, and the run ends as if nothing had happened."""
    folder = tmp_path / "run"
    ended = train(folder, ranks, f"{point} rank={rank} {SAVING[point]}")
    assert killed(ended.statuses, rank), ended.output
    assert choose(folder / "checkpoints").generation.step in (4, 6)
    again = resume(folder, ranks)
    assert again.ok, again.output
    assert_same_in_the_end(folder, whole(ranks))


@pytest.mark.crash
@pytest.mark.parametrize("point", ["save.begin", "save.shard", "save.manifest", "save.rename"])
def test_killed_in_the_first_save(point: str, tmp_path: Path) -> None:
    """There is no state to continue from: said so, with what to do."""
    folder = tmp_path / "run"
    assert killed(train(folder, 1, point).statuses, 0)
    again = resume(folder)
    assert again.statuses == (1,)
    assert "no checkpoint in" in again.output
    assert "start again with `fullweight train`" in again.output
    assert "Traceback" not in again.output


@pytest.mark.crash
def test_killed_before_the_first_pointer(tmp_path: Path, whole: Whole) -> None:
    """The first generation has its name and nothing points to it yet: it is whole, and used."""
    folder = tmp_path / "run"
    assert killed(train(folder, 1, "save.pointer").statuses, 0)
    assert not (folder / "checkpoints" / "latest").exists()
    assert resume(folder).ok
    assert_same_in_the_end(folder, whole(1))


@pytest.mark.crash
@pytest.mark.parametrize("point", ["load.verify", "load.read"])
@pytest.mark.parametrize(("ranks", "rank"), WHO)
def test_killed_while_loading(point: str, ranks: int, rank: int, tmp_path: Path, whole: Whole) -> None:
    """Reading changes nothing: the next resume does what this one would have done. Twice in a row."""
    folder = tmp_path / "run"
    assert killed(train(folder, ranks, "save.begin save=3").statuses, 0)
    for _ in range(2):
        ended = resume(folder, ranks, crash=f"{point} rank={rank}")
        assert killed(ended.statuses, rank), ended.output
    again = resume(folder, ranks)
    assert again.ok, again.output
    assert_same_in_the_end(folder, whole(ranks))


@pytest.mark.crash
@pytest.mark.parametrize(("ranks", "rank"), WHO)
def test_killed_while_exporting(ranks: int, rank: int, tmp_path: Path, whole: Whole) -> None:
    """The exported folder is whole or absent; resuming the finished run writes it, byte for byte."""
    folder, reference = tmp_path / "run", tmp_path / "reference"
    settings = ("export.enabled=true",)
    ended = train(folder, ranks, f"export rank={rank}", settings)
    assert killed(ended.statuses, rank), ended.output
    assert resume(folder, ranks).ok
    assert_same_in_the_end(folder, whole(ranks))
    assert train(reference, ranks, settings=settings).ok
    expected = sorted((reference / "export").iterdir())
    assert len(expected) > 3
    assert [p.name for p in sorted((folder / "export").iterdir())] == [p.name for p in expected]
    for path in expected:
        assert (folder / "export" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(folder.glob(".export*"))


def as_recipe(optimizer: str, ranks: int) -> tuple[str, ...]:
    """As many rows as ranks, of which three cut every tensor unevenly."""
    return (f"optimizer.name={optimizer}", f"train.rows_per_step={ranks}", "checkpoint.asynchronous=false")


@pytest.mark.parametrize(
    ("optimizer", "ranks"),
    [
        pytest.param(optimizer, ranks, marks=() if (optimizer, ranks) == ("adamw", 3) else pytest.mark.crash)
        for optimizer in ("adamw", "muon")
        for ranks in (1, 2, 3, 4)
    ],
)
def test_half_and_half_is_the_whole(optimizer: str, ranks: int, tmp_path: Path) -> None:
    """N steps, save, kill -9, resume, N more: losses, weights and both moments of 2N steps, bit for bit."""
    settings, halves, whole = as_recipe(optimizer, ranks), tmp_path / "halves", tmp_path / "whole"
    assert train(whole, ranks, settings=settings).ok
    ended = train(halves, ranks, f"save.begin rank={ranks - 1} save=3", settings)
    assert killed(ended.statuses, ranks - 1), ended.output
    assert choose(halves / "checkpoints").generation.step == 4
    again = resume(halves, ranks)
    assert again.ok, again.output
    assert_same_in_the_end(halves, whole)


@pytest.mark.crash
def test_killed_again_and_again(tmp_path: Path, whole: Whole) -> None:
    """Five deaths at five points, one after the other, and the run still ends right."""
    folder = tmp_path / "run"
    assert killed(train(folder, 1, "save.shard save=2 nth=50").statuses, 0)
    for crash in ("load.read", "save.pointer", "save.flush", "save.retention save=2"):
        assert killed(resume(folder, crash=crash).statuses, 0), crash
    assert resume(folder).ok
    assert_same_in_the_end(folder, whole(1))


def test_killed_between_manifest_and_name(tmp_path: Path, whole: Whole) -> None:
    """The quick case of `make test`: two ranks, one killed, the bits of the uninterrupted run."""
    folder = tmp_path / "run"
    ended = train(folder, 2, "save.rename rank=0 save=3")
    assert killed(ended.statuses, 0), ended.output
    assert "error (rank 1): rank 0, which holds the store, is gone" in ended.output
    assert f"last checkpoint: step-4; continue with\n  fullweight resume {folder}" in ended.output
    assert "Traceback" not in ended.output
    assert choose(folder / "checkpoints").generation.step == 4
    again = resume(folder, 2)
    assert again.ok, again.output
    assert_same_in_the_end(folder, whole(2))


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, whole: Whole) -> None:
    """The flush of step 4 sleeps and dies; steps after 4 were trained meanwhile, and are run again to the bit."""
    folder = tmp_path / "run"
    assert killed(train(folder, 1, "save.flush nth=2 delay=1.5").statuses, 0)
    before = lines(folder)
    assert before[-1]["step"] > 4
    assert resume(folder).ok
    after = {line["step"]: line["loss"] for line in lines(folder)}
    assert all(after[line["step"]] == line["loss"] for line in before)
    assert_same_in_the_end(folder, whole(1))


def test_every_point_is_swept() -> None:
    """A new point has to be killed at; `begin.source` is in test_begin.py."""
    assert {*SAVING, "begin.source", "load.verify", "load.read", "export"} == set(POINTS)


@pytest.mark.crash
def test_a_copy_of_the_whole_run_resumes(tmp_path: Path, whole: Whole) -> None:
    """A run folder may be moved: nothing in it knows where it lies."""
    folder = tmp_path / "moved"
    shutil.copytree(whole(1), folder)
    assert resume(folder).ok
    assert_same_in_the_end(folder, whole(1))
