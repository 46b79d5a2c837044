"""What `train` does when the launcher starts it again: go on with the run that the same launch began.

A run folder keeps which launch made it (`launch.json`, written before anything else). When `torchrun` restarts its
ranks, or a scheduler starts the same job again under the same `--rdzv-id`, the folder is recognised: with a
checkpoint the run is resumed, without one what there is of it is removed, but for the ledger, and the run starts
over in another segment of that ledger, so that no attempt is hidden. A folder of anybody else, or of another
configuration, is refused as ever. Rank 0 decides.
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from fullweight.checkpoint import generations
from fullweight.core.errors import ConfigError
from fullweight.core.launcher import restart_count
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder, free_name

_NO_NAME = {"", "none"}  # torchrun's --rdzv-id when nobody gave one


class Beginning(StrEnum):
    """How a call of `train` begins."""

    fresh = "fresh"
    again = "again"  # in the folder of an attempt that came to no checkpoint
    resumed = "resumed"


def launch_id() -> str | None:
    """What tells this launch from every other one, the same after a restart; None without torchrun.

    The rendezvous id where there is one; else the launcher's process on rank 0's machine.
    """
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    if given is None:
        return None
    if given not in _NO_NAME:
        return given
    launcher = psutil.Process(os.getppid())
    return f"{os.uname().nodename} {launcher.pid} {launcher.create_time()}"


def begin(config: RunConfig) -> tuple[RunFolder, Beginning]:
    """The folder of the run, and whether to resume it. Raises ConfigError when it belongs to something else."""
    launch = launch_id()
    folder = RunFolder(config.output or _own_name(Path("runs") / config.name, launch))
    if launch is None or _made_by(folder) != launch:
        folder.check_free()
        return folder, Beginning.fresh
    _require_same_config(config, folder)
    if generations.listed(folder.checkpoints):
        return folder, Beginning.resumed
    with generations.locked(folder.checkpoints):
        folder.clear()
    return folder, Beginning.again


def this_launch() -> dict[str, Any]:
    """What a new folder keeps of the launch that makes it."""
    return {"launch": launch_id(), "restarts": restart_count()}


def restarted() -> dict[str, Any]:
    """For the ledger: how often the launcher started these ranks again, if it did."""
    count = restart_count()
    return {"restart": count} if count else {}


def _own_name(wanted: Path, launch: str | None) -> Path:
    """The folder among `wanted`, `wanted-2`, ... that this launch made, or the first free one."""
    for candidate in sorted(wanted.parent.glob(f"{wanted.name}*")):
        if launch is not None and _made_by(RunFolder(candidate)) == launch:
            return candidate
    return free_name(wanted)


def _made_by(folder: RunFolder) -> str | None:
    try:
        made_by: str | None = json.loads(folder.launch.read_text(encoding="utf-8"))["launch"]
    except FileNotFoundError:
        return None
    return made_by


def _require_same_config(config: RunConfig, folder: RunFolder) -> None:
    if not folder.config.is_file():  # killed while the folder was made
        return
    found = json.loads(folder.config.read_text(encoding="utf-8"))
    wanted = config.model_dump(mode="json")
    if {**found, "output": None} != {**wanted, "output": None}:
        raise ConfigError(
            f"{folder.root} was begun by this launch with another configuration; choose another --output, or "
            f"continue it as it is with `fullweight resume {folder.root}`"
        )
