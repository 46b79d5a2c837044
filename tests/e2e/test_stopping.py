"""Ctrl-C and SIGTERM as real processes get them, alone and under torchrun: saved, told, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.e2e.conftest import ROOT, SMOKE, Command, ledger

SETTINGS = ["train.num_steps=100000", "eval.num_samples=0", "export.enabled=false", "schedule.kind=constant"]


def start(run: Path, ranks: int) -> subprocess.Popen[str]:
    """A run that would take hours, once it has done a few steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "fullweight", "train", str(SMOKE), "--output", str(run)]
    for setting in SETTINGS:
        command += ["--set", setting]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )
    deadline = time.monotonic() + 240
    while not (run / "ledger.jsonl").is_file() or len((run / "ledger.jsonl").read_text().splitlines()) < 5:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)
    return process


def check_stopped(run: Path, output: str, fullweight: Command) -> None:
    """The last recorded step is the saved one, and the printed command goes on from there."""
    step = ledger(run)[-1]["step"]
    assert f"stopped after step {step}, state saved; continue with" in output
    assert f"fullweight resume {run}" in output
    assert "stopping after this step" in output
    config = json.loads((run / "config.json").read_text())
    config["train"]["num_steps"] = step + 1
    (run / "config.json").write_text(json.dumps(config))
    fullweight("resume", run)
    assert [s["step"] for s in ledger(run)] == list(range(1, step + 2))


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, fullweight: Command) -> None:
    """What schedulers send; SIGINT is tested beside exact resuming (test_train.py)."""
    run = tmp_path / "run"
    process = start(run, 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    check_stopped(run, output, fullweight)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_saves_on_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    """torchrun passes it on, waits for the ranks, and ends with 1 and its own traceback, whatever they say."""
    run = tmp_path / "run"
    process = start(run, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    step = ledger(run)[-1]["step"]
    assert output.count(f"stopped after step {step}, state saved; continue with") == 1
    assert "SignalException" in output
    assert "fullweight/" not in output.partition("Traceback")[2], "no frame of ours"


def test_a_signal_to_one_rank_stops_all_and_torchrun_reports_why(tmp_path: Path) -> None:
    """Every rank leaves with 130 after the same step, and the message is in torchrun's report."""
    run = tmp_path / "run"
    process = start(run, 2)
    rank = min(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    rank.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    report = output[output.index("Root Cause") :]
    assert "exitcode  : 130" in report
    assert f"stopped after step {ledger(run)[-1]['step']}, state saved" in report
