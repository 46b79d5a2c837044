"""Runs of the command line, each in a process of its own; tests that interrupt one start it as a user does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import processes

from fullweight.evidence.ledger import read

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "tiny_smoke.toml"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fullweight() -> Command:
    """Run `fullweight ARGUMENTS` from the repository root on one thread; returns the finished process."""

    def run(*arguments: str | Path, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        ended = processes.fullweight(*arguments, environment=environment, limit_seconds=500, apart=True)
        [status] = ended.statuses
        assert check is None or status == check, ended.output + ended.errors
        return subprocess.CompletedProcess(arguments, status, ended.output, ended.errors)

    return run


def ledger(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind in a run's ledger."""
    lines = list(read(run / "ledger.jsonl"))
    return [line for line in lines if line["kind"] == kind]
