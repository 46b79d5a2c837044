"""Where the ranks meet: the key-value store that torchrun, or rank 0, holds.

Each rank says that it came and waits, up to a bound, until all have; who is missing is named. The store then
carries the process group's set-up and what ranks must be able to tell each other when no collective works any
more (`watch.py`). Environment variables are those of torchrun, which other launchers set too. Left out: stores
on a shared file system.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from fullweight.core.errors import ToldError, TrainingError
from fullweight.core.launcher import restart_count
from fullweight.parallel.launch import LaunchConfig

_LAST_LOOK_SECONDS = 3.0
_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Meeting:
    """The ranks of a run and the store between them; `hosts` says that this very process holds it."""

    rank: int
    size: int
    store: dist.Store
    hosts: bool


def meet(config: LaunchConfig, size: int) -> Meeting:
    """Come to the store and wait for all ranks. Raises TrainingError naming who is missing, or where."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the ranks with torchrun, or set it"
        )
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank == 0 and not by_agent
    limit = timedelta(seconds=config.join_seconds)
    try:
        store = dist.TCPStore(host, port, size, hosts, limit, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        holder = "torchrun on the first machine" if by_agent else "rank 0"
        raise TrainingError(
            f"no store at {host}:{port}, where {holder} must hold it ({_first_line(error)}); check MASTER_ADDR, "
            "MASTER_PORT and the network between the machines"
        ) from None
    prefixed = dist.PrefixStore(f"fullweight/attempt-{restart_count()}", store)
    meeting = Meeting(rank, size, prefixed, hosts)
    _wait_for_all(meeting, limit)
    return meeting


def _wait_for_all(meeting: Meeting, limit: timedelta) -> None:
    store, size = meeting.store, meeting.size
    store.set(f"here/{meeting.rank}", "")
    try:
        store.wait([f"here/{r}" for r in range(size)], limit)
    except dist.DistError:
        missing = _missing(meeting)
        message = (
            f"{named(missing) if missing else 'some rank'} of {size} did not come within "
            f"{limit.total_seconds():.0f} s; see what was printed there, or raise launch.join_seconds"
        )
        raise (TrainingError if meeting.rank == 0 or 0 in missing else ToldError)(message) from None


def _missing(meeting: Meeting) -> list[int]:
    """Who did not come; empty when the store has gone with its holder, which gives the others time to look."""
    try:
        missing = [r for r in range(meeting.size) if not meeting.store.check([f"here/{r}"])]
    except dist.DistError:
        return []
    if meeting.hosts:
        time.sleep(_LAST_LOOK_SECONDS)
    return missing


def named(ranks: list[int]) -> str:
    """Ranks in words, runs of them shortened.

    >>> named([3]), named([0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
