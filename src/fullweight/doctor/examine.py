"""Examining the machines of a job: every rank gathers its facts, and all meet on rank 0.

Facts travel through the launcher's store, because a network or an accelerator that does not work must be named and
not hung on. Only when nothing is wrong so far are process groups made, one on the host (gloo) and, where every
rank has the device, one on the device, and clocks and collectives tried. A run that starts looks at the same facts
without self-tests (`glance`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fullweight.core.errors import FullweightError
from fullweight.devices import DEVICES, Device, find
from fullweight.doctor.clocks import Clock, compare_clocks
from fullweight.doctor.collectives import try_collectives
from fullweight.doctor.compare import check_job
from fullweight.doctor.facts import CollectiveResult, Facts, Job, OperationResult
from fullweight.doctor.findings import Finding, Severity, blocking
from fullweight.doctor.gather import DeviceName, gather_facts
from fullweight.doctor.operations import try_operations
from fullweight.ops import resolve_operations
from fullweight.parallel.launch import LaunchConfig
from fullweight.parallel.rendezvous import Meeting, meet

UNWISE = 3  # exit status
_HOST, _DEVICE = "host", "device"
_GROUP_SECONDS = 300.0  # a doctor that hangs helps nobody


@dataclass(frozen=True)
class Wish:
    """What the examined run wants: defaults are those of a recipe that says nothing."""

    device: str = "auto"
    operations: str = "auto"
    chosen: Mapping[str, str] = field(default_factory=dict)  # operations of groups
    run_folder: Path = Path("runs")
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    deterministic: bool = False
    accept: tuple[str, ...] = ()
    needed_disk_bytes: int | None = None
    applied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Examined:
    """What came of it: the facts and findings are on rank 0 alone, the exit status is every rank's."""

    status: int
    job: Job | None = None
    findings: tuple[Finding, ...] = ()


def examine(wish: Wish, *, self_tests: bool = True) -> Examined:
    """The whole examination, on this machine or, under torchrun, on all.

    Raises TrainingError when ranks do not come.
    """
    name, device = _device(wish.device)
    place = None if device is None else device.device(int(os.environ.get("LOCAL_RANK", "0")))
    chosen, results = "", tuple[OperationResult, ...]()
    if place is not None:
        chosen, results = _operations(wish, place, self_tests)
    facts = gather_facts(
        name,
        device,
        run_folder=wish.run_folder,
        asked=wish.device,
        operations_set=chosen,
        operations=results,
        applied=wish.applied,
    )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return _judged(wish, [facts], [])
    meeting = meet(wish.launch, size)
    board = _Board(meeting)
    machines = [Facts.model_validate_json(text) for text in board.gather(facts.model_dump_json())]
    plan = ""
    if meeting.rank == 0 and self_tests:
        plan = _plan(job_of(wish, machines))
    plan = board.from_rank_0(plan)
    collectives: list[CollectiveResult] = []
    if plan:
        machines, collectives = _try(meeting, machines, device if plan == _DEVICE else None, place)
    examined = _judged(wish, machines, collectives) if meeting.rank == 0 else None
    status = int(board.from_rank_0(str(examined.status) if examined else ""))
    board.leave()
    return examined or Examined(status)


def _judged(wish: Wish, machines: list[Facts], collectives: list[CollectiveResult]) -> Examined:
    job = job_of(wish, machines, collectives)
    findings = check_job(job)
    return Examined(status_of(job, findings), job, tuple(findings))


def _plan(job: Job) -> str:
    """What to try together: nothing while there are errors, which could make a collective hang."""
    if any(f.severity is Severity.error for f in check_job(job)):
        return ""
    names = {f.device for f in job.machines}
    absent = any(f.device in f.absent for f in job.machines)
    return _DEVICE if names != {"cpu"} and len(names) == 1 and not absent else _HOST


def _try(
    meeting: Meeting, machines: list[Facts], device: Device | None, place: torch.device | None
) -> tuple[list[Facts], list[CollectiveResult]]:
    """The machines with their clocks, and the collectives that were tried."""
    timeout = timedelta(seconds=_GROUP_SECONDS)
    dist.init_process_group(
        "gloo", store=meeting.store, rank=meeting.rank, world_size=meeting.size, timeout=timeout
    )
    try:
        clocks = compare_clocks()
        results = try_collectives(find("cpu"), torch.device("cpu"))
        if device is not None and place is not None:
            results += _of_device(device, place)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return [_with_clock(f, clock) for f, clock in zip(machines, clocks, strict=True)], results


class _Board:
    """Texts that ranks leave for each other in the launcher's store."""

    def __init__(self, meeting: Meeting) -> None:
        self._rank, self._size, self._posts = meeting.rank, meeting.size, 0
        self._store = dist.PrefixStore("doctor", meeting.store)
        self._store.set_timeout(timedelta(seconds=_GROUP_SECONDS))

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order."""
        self._posts += 1
        self._store.set(f"{self._posts}/{self._rank}", text)
        return [self._store.get(f"{self._posts}/{rank}").decode() for rank in range(self._size)]

    def from_rank_0(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        self._posts += 1
        if self._rank == 0:
            self._store.set(f"{self._posts}", text)
        return self._store.get(f"{self._posts}").decode()

    def leave(self) -> None:
        """Return when all are here, rank 0, which may hold the store, last."""
        self._store.set(f"left/{self._rank}", "")
        if self._rank == 0:
            self._store.wait([f"left/{rank}" for rank in range(self._size)])


def status_of(job: Job, findings: Sequence[Finding]) -> int:
    """Exit status: 0 a run would start, 1 errors, 3 only unwise things that the recipe does not accept."""
    if any(f.severity is Severity.error for f in findings):
        return 1
    return UNWISE if blocking(findings, job.accept) else 0


def glance(wish: Wish, device: Device) -> Facts:
    """What a run looks at before it starts: this rank's facts without self-tests."""
    return gather_facts(
        device.name,  # type: ignore[arg-type]
        device,
        run_folder=wish.run_folder,
        asked=wish.device,
        applied=wish.applied,
    )


def job_of(wish: Wish, machines: list[Facts], collectives: list[CollectiveResult] | None = None) -> Job:
    """The ranks' facts and the wish, as checks take them."""
    return Job(
        ranks=len(machines),
        group_timeout_seconds=wish.launch.collective_timeout_seconds,
        deterministic=wish.deterministic,
        accept=wish.accept,
        needed_disk_bytes=wish.needed_disk_bytes,
        machines=tuple(machines),
        collectives=tuple(collectives or ()),
    )


def _of_device(device: Device, place: torch.device) -> list[CollectiveResult]:
    try:
        group = dist.new_group(backend=device.backend())
    except RuntimeError as error:  # the vendor's library cannot begin
        why = str(error).strip().partition("\n")[0]
        told = {"collective": "process group", "device": place.type, "message_bytes": 0}
        return [CollectiveResult(**told, correct=False, failure=why)]
    return try_collectives(device, place, group)


def _with_clock(facts: Facts, clock: Clock) -> Facts:
    seconds = {
        "clock_offset_seconds": clock.offset_seconds,
        "clock_uncertainty_seconds": clock.uncertainty_seconds,
    }
    return facts.model_copy(update=seconds)


def _device(asked: str) -> tuple[DeviceName, Device | None]:
    """The device asked for; None when it cannot be used, which is a finding and no failure."""
    name: Any = asked if asked in DEVICES and DEVICES[asked].available() is not None else find(asked).name
    return name, None if DEVICES[name].available() is not None else find(name)


def _operations(wish: Wish, place: torch.device, self_tests: bool) -> tuple[str, tuple[OperationResult, ...]]:
    try:
        ops = resolve_operations(wish.operations, place.type, wish.chosen)
    except FullweightError as error:
        failure = OperationResult(operation="set", dtype=wish.operations, tolerance=0.0, failure=str(error))
        return wish.operations, (failure,)
    return ops.name, tuple(try_operations(ops, place)) if self_tests else ()
