"""torchrun starts dead ranks again: the run goes on by itself, to the bits of a run that nothing interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.runs import RECIPE, SETTINGS, assert_same_in_the_end, lines

from fullweight.core.crash import VARIABLE
from fullweight.evidence.ledger import read_all

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, crash: str = "", *settings: str, launch: tuple[str, ...] = ()) -> tuple[int, str]:
    """(status, output) of two ranks of the crash tests' run of 8 steps, started again at most once."""
    command = [sys.executable, "-m", "torch.distributed.run", *(launch or ("--standalone",))]
    command += ["--nproc-per-node=2", "--max-restarts=1", "-m", "fullweight", "train", RECIPE]
    for setting in (*SETTINGS, *settings):
        command += ["--set", setting]
    done = subprocess.run(
        [*command, "--output", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", VARIABLE: crash},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, output = torchrun(folder)
    assert status == 0, output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_between_steps_is_started_again_and_nothing_is_lost(
    rank: int, tmp_path: Path, whole: Path
) -> None:
    """kill -9 before step 7: the second start resumes, and losses, weights and moments are the same bits."""
    folder = tmp_path / "run"
    status, output = torchrun(folder, f"train.step rank={rank} nth=7")
    assert status == 0, output
    assert f"rank {rank} is gone" in output
    assert f"resumed {folder} after step " in output
    [resumed] = [line for line in lines(folder, "event") if line["what"] == "resume"]
    assert resumed["restart"] == 1
    assert_same_in_the_end(folder, whole)


@pytest.mark.slow
def test_a_rank_killed_before_the_first_checkpoint_starts_the_run_over(tmp_path: Path, whole: Path) -> None:
    """What there is of the run is removed, for it is this launch's own; but the ledger shows the first attempt."""
    folder = tmp_path / "run"
    status, output = torchrun(folder, "train.step rank=1 nth=2")
    assert status == 0, output
    assert "there is no checkpoint yet" in output
    [start] = [line for line in lines(folder, "event") if line["what"] == "start"]
    assert (start["restart"], start["segment"]) == (1, 1)
    attempts = list(read_all(folder / "ledger.jsonl"))
    assert [(e.entry["kind"], e.entry["step"], e.superseded) for e in attempts[:3]] == [
        ("event", 0, True),
        ("eval", 0, True),
        ("step", 1, True),
    ]
    assert attempts[3].entry["previous"] == attempts[2].sha256
    assert_same_in_the_end(folder, whole)


@pytest.mark.slow
def test_the_same_job_started_again_goes_on_and_another_does_not(tmp_path: Path, whole: Path) -> None:
    """A scheduler that requeues a job keeps its --rdzv-id; other ids and configurations leave the folder alone."""
    folder = tmp_path / "run"
    job = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=job-7")
    status, output = torchrun(folder, "save.manifest rank=0 save=3", launch=job)
    assert status == 0, output  # died once and was started again
    assert_same_in_the_end(folder, whole)
    before = (folder / "ledger.jsonl").read_bytes()

    status, output = torchrun(folder)
    assert status == 1
    assert "is not empty; choose another --output" in output
    status, output = torchrun(folder, "", "train.seed=5", launch=job)
    assert status == 1
    assert "was begun by this launch with another configuration" in output
    assert (folder / "ledger.jsonl").read_bytes() == before

    status, output = torchrun(folder, launch=job)
    assert status == 0, output
    assert f"resumed {folder} after step 8 of 8" in output
    assert json.loads(before.splitlines()[0]) == lines(folder, "event")[0]
