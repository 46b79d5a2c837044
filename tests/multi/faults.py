"""The command line on a rank that does something wrong at one place, as FAULT in the environment says.

    FAULT="rank=1 phase=forward step=3 do=stop"     # stop, kill, sleep, skip, slow, raise, fail
    FAULT="rank=1 do=config"                        # config, environment, code, data: other than on other ranks

`main` is `fullweight`'s own; the fault sits in the notes that the training thread takes of its phases.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fullweight.cli.main import main as fullweight
from fullweight.core import phase
from fullweight.core.errors import DataError
from fullweight.parallel import agreement, watch


def main(arguments: list[str]) -> int:
    """Run the command line with the fault of this rank."""
    fault = dict(part.split("=", 1) for part in os.environ["FAULT"].split())
    here = fault["rank"] == os.environ["RANK"]
    if fault["do"] == "data":
        _read_own_file(Path(fault["path"]))
    elif here and fault["do"] == "config":
        arguments = [*arguments, "--set", "train.seed=7"]
    elif here and fault["do"] == "environment":
        os.environ["GLOO_DEVICE_TRANSPORT"] = "TCP"
    elif here and fault["do"] == "code":
        agreement.code_digest = lambda: "0" * 64
    elif here and fault["do"] == "absent":
        return 0
    elif here:
        _plant(fault)
    if fault["do"] == "slow":
        watch._STRAGGLER_LOOK_SECONDS = 3.0
    return fullweight(arguments)


def _read_own_file(folder: Path) -> None:
    """As on machines whose disks hold different files of one name."""
    open_path = Path.open

    def own(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path == folder / "data.jsonl":
            path = folder / f"data-{os.environ['RANK']}.jsonl"
        return open_path(path, *arguments, **settings)

    Path.open = own  # type: ignore[method-assign]


def _plant(fault: dict[str, str]) -> None:
    enter, begin_step = phase.enter, phase.begin_step

    def look() -> None:
        place = phase.now()
        if place.phase == fault["phase"] and place.step == int(fault["step"]):
            _do(fault["do"])
        if fault["do"] == "slow" and place.in_step and place.phase == fault["phase"]:
            time.sleep(float(fault["seconds"]))

    def faulty_enter(name: str, detail: str = "") -> None:
        enter(name, detail)
        look()

    def faulty_begin_step(step: int) -> None:
        begin_step(step)
        look()

    phase.enter, phase.begin_step = faulty_enter, faulty_begin_step


def _do(what: str) -> None:
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "sleep":
        time.sleep(10_000)
    elif what == "skip":  # waits for what no other rank does
        dist.recv(torch.zeros(3), src=0)
    elif what == "raise":
        raise AssertionError("a bug of this rank")
    elif what == "fail":
        raise DataError("shard.jsonl:7: a mistake that only this rank can see")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
