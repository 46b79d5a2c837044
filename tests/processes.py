"""Commands of fullweight in processes of their own that start in a fraction of a second, and can be killed.

A server process imports everything once and is forked for each rank; a rank is a real process with its own
environment, output file and exit status, running the command line's own `main`. Ranks find each other as under
torchrun, and as there the rest is ended when one dies.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_GRACE_SECONDS = 10.0
_LIMIT_SECONDS = 120.0
_LOOK_SECONDS = 0.02
_PRELOADED = ["torch", "torch.distributed", "fullweight.cli.main", "fullweight.train.loop", __name__]
_PRELOADED += ["fullweight.report.document"]


@dataclass(frozen=True)
class Ended:
    """How a command ended on each rank (negative: by that signal), and all that they printed."""

    statuses: tuple[int, ...]
    output: str
    errors: str = ""  # on standard error, where that was kept apart

    @property
    def ok(self) -> bool:
        return not any(self.statuses)


def fullweight(
    *arguments: str | Path,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    call: str = "fullweight.cli.main:main",
    limit_seconds: float = _LIMIT_SECONDS,
    apart: bool = False,
) -> Ended:
    """Run `call` (a function of a list of arguments that returns an exit status) on so many ranks.

    What has not ended after `limit_seconds` of looking is killed. `apart`: what is on standard error
    is no part of the output.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the server, before anything starts threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        errors = [log.with_suffix(".errors") if apart else log for log in logs]
        together = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environment or {})}
        if ranks > 1:
            together |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        processes = []
        for rank, files in enumerate(zip(logs, errors, strict=True)):
            own = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else together
            process = context.Process(target=_enter, args=(call, list(map(str, arguments)), own, *map(str, files)))
            process.start()
            processes.append(process)
        statuses = _join(processes, limit_seconds)
        return Ended(statuses, _text(logs), _text(errors) if apart else "")


def _text(files: Sequence[Path]) -> str:
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


def _enter(call: str, arguments: list[str], environment: dict[str, str], log: str, errors: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    for stream, file in ((1, log), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    module, _, function = call.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(arguments))


def _join(processes: Sequence[multiprocessing.process.BaseProcess], limit_seconds: float) -> tuple[int, ...]:
    """Wait for all; when one fails the others get a moment to notice, then are ended.

    Time is counted in looks, not by the clock: a machine that was paused must not end a healthy run.
    """
    looks_left = int(limit_seconds / _LOOK_SECONDS)
    while any(p.is_alive() for p in processes):
        if any(p.exitcode for p in processes):
            looks_left = min(looks_left, int(_GRACE_SECONDS / _LOOK_SECONDS))
        if not looks_left:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
            looks_left = 1
        looks_left -= 1
        time.sleep(_LOOK_SECONDS)
    return tuple(p.exitcode if p.exitcode is not None else -1 for p in processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
