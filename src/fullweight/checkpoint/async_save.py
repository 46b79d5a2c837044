"""Saving while training goes on: a snapshot, one background writer, retries, and a limit to failing.

`save` waits for the save before it, copies the state to host memory and returns; the time that took is the stall.
A thread then writes the copy with its own process group and, on Linux, at a low priority. One write is in flight
at a time, so two saves never overlap on disk and memory holds one copy. A failed attempt is reported, and the same
snapshot is tried again after a pause that doubles; after `max_failures` in a row the writer gives up for good, and
the loop must stop: the last generation that was written is untouched. All ranks see the same attempts fail,
because `store.save` agrees.

What went wrong is never kept back: `reports` hands over every outcome once, and an error that is not the disk's is
raised again in the training thread.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Facts
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.snapshot import Snapshot
from fullweight.checkpoint.store import Saved, State
from fullweight.core.config import Config
from fullweight.core.crash import crash_point
from fullweight.core.errors import CheckpointError

_BACKGROUND_NICENESS = 10  # about a tenth of a processor beside a busy thread, all of it beside none


class SaveConfig(Config):
    """How checkpoints are written, and how many are kept."""

    keep: PositiveInt = 2
    asynchronous: bool = Field(True, description="go on training while a copy of the state is written")
    max_failures: PositiveInt = Field(3, description="attempts in a row that may fail before the run stops")
    retry_seconds: NonNegativeFloat = Field(10.0, description="pause before the second attempt; doubles each time")


@dataclass(frozen=True)
class Stall:
    """What one save cost the training thread."""

    seconds: float
    waited_seconds: float  # of them, for the save before
    synchronous: str | None  # why the write was not in the background; None when it was


@dataclass(frozen=True)
class Failure:
    """One attempt that did not become a generation."""

    step: int
    attempt: int
    reason: str


Report = Saved | Failure


class Saver:
    """The one writer of a run's checkpoint folder; every rank has one, all made together."""

    def __init__(self, folder: Path, config: SaveConfig) -> None:
        self.folder, self.config = folder, config
        self.gave_up: Failure | None = None
        self.peers = Peers.of_their_own()
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._broken: BaseException | None = None

    def save(self, state: State, facts: Facts, before: Callable[[], None] | None = None) -> Stall:
        """Begin to save; all ranks together, with their shards and the same facts. Nothing after `gave_up`.

        `before` puts on the disk what the state relies on: first in every attempt, on rank 0; an OSError fails it.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if self.gave_up is not None:
            return Stall(waited, waited, None)
        reason = "checkpoint.asynchronous is off" if not self.config.asynchronous else self._snapshot.room(state)
        if reason is not None:
            self._attempts(state, facts, before)
        else:
            copy = self._snapshot.take(state)
            self._start(lambda: self._attempts(copy, facts, before))
        return Stall(time.perf_counter() - began, waited, reason)

    def wait(self, seconds: float | None = None) -> bool:
        """Until nothing is being written, or so long; whether nothing is.

        Raises what broke the writer, if it was not the disk.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._broken is not None:
            raise self._broken
        return True

    def reports(self) -> list[Report]:
        """What happened since the last call, in order; raises what broke the writer, if it was not the disk."""
        found: list[Report] = []
        while not self._reports.empty():
            found.append(self._reports.get())
        if self._broken is not None and self._thread is not None and not self._thread.is_alive():
            raise self._broken
        return found

    def _start(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                _yield_to_training()
                crash_point("save.flush")
                work()
            except BaseException as error:
                self._broken = error

        # A daemon: an interrupted process must be able to end; what it was writing has no name yet.
        self._thread = threading.Thread(target=run, name="fullweight-checkpoint", daemon=True)
        self._thread.start()

    def _attempts(self, state: State, facts: Facts, before: Callable[[], None] | None) -> None:
        for attempt in range(1, self.config.max_failures + 1):
            try:
                saved = store.save(
                    self.folder, state, facts, keep=self.config.keep, peers=self.peers, before=before
                )
            except CheckpointError as error:
                failure = Failure(facts.step, attempt, str(error))
                self._reports.put(failure)
                if attempt == self.config.max_failures:
                    self.gave_up = failure
                    return
                time.sleep(self.config.retry_seconds * 2 ** (attempt - 1))
            else:
                self._reports.put(saved)
                return


def _yield_to_training() -> None:
    """Let this thread, and those it starts, have a processor when training leaves one."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
