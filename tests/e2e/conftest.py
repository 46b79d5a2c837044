"""Runs of the command line in fresh processes, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fullweight.evidence.ledger import read

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "tiny_smoke.toml"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fullweight() -> Command:
    """Run `fullweight ARGUMENTS` from the repository root on one thread; returns the finished process."""

    def run(*arguments: str | Path, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fullweight", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=500
        )
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    return run


def ledger(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind in a run's ledger."""
    lines = list(read(run / "ledger.jsonl"))
    return [line for line in lines if line["kind"] == kind]
