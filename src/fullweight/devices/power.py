"""Mean power over a stretch of time, without making training wait for it.

A counter of energy is read at both ends, which takes microseconds. Where there is none, a thread asks the vendor's
tool every few seconds and the readings inside the stretch are averaged. What cannot be read is None, not a guess.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

Counters = dict[str, tuple[float, float]]
"""Joules counted so far, and where the counter begins anew, by the part of the machine that it counts for."""


class PowerMeter(ABC):
    """Watts between `begin` and `watts`; one of a process."""

    source: ClassVar[str]
    """Where its numbers come from, for the record."""

    @abstractmethod
    def begin(self) -> None:
        """A stretch begins."""

    @abstractmethod
    def watts(self) -> float | None:
        """Mean power since `begin`; None when it cannot be read."""

    @abstractmethod
    def close(self) -> None:
        """No more stretches will come."""


class EnergyCounters(PowerMeter):
    """From counters that `read` gives, or None where they cannot be read."""

    source = "RAPL energy counters, all packages of the machine"

    def __init__(
        self, read: Callable[[], Counters | None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._read, self._clock = read, clock
        self._before, self._started = read(), clock()
        self.readable = self._before is not None  # asked once: the files are there or they are not

    def begin(self) -> None:
        if self.readable:
            self._before, self._started = self._read(), self._clock()

    def watts(self) -> float | None:
        if not self.readable:
            return None
        after, seconds = self._read(), self._clock() - self._started
        if self._before is None or after is None or after.keys() != self._before.keys() or seconds <= 0:
            return None
        # a counter of 262 kJ begins anew after a quarter of an hour at 300 W: longer steps would be counted short
        spent = {name: (joules - self._before[name][0]) % limit for name, (joules, limit) in after.items()}
        return sum(spent.values()) / seconds

    def close(self) -> None:
        """Nothing is kept open."""


class Elsewhere(PowerMeter):
    """Of a rank whose power another rank of its machine tells: nothing to add."""

    source = "another rank of the machine"

    def begin(self) -> None:
        """Nothing begins."""

    def watts(self) -> float | None:
        return 0.0

    def close(self) -> None:
        """Nothing is kept open."""


class Readings(PowerMeter):
    """From a tool that takes long: `read` is called every `every` seconds, in a thread that `enter` prepares."""

    source = "the vendor's tool"

    def __init__(
        self, read: Callable[[], float | None], every: float = 5.0, enter: Callable[[], None] = lambda: None
    ) -> None:
        self._read, self._every, self._enter = read, every, enter
        self._values: list[float] = []
        self._newest: tuple[float, float] | None = None  # (when, watts)
        self._thread: threading.Thread | None = None
        self._ended, self._lock = threading.Event(), threading.Lock()

    def begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fullweight-power", daemon=True)
            self._thread.start()
        with self._lock:
            self._values.clear()

    def watts(self) -> float | None:
        """Of a stretch without a reading inside, the last one before it, if no older than the interval."""
        with self._lock:
            if self._values:
                return sum(self._values) / len(self._values)
            if self._newest is not None and time.monotonic() - self._newest[0] <= 2 * self._every:
                return self._newest[1]
        return None

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        self._enter()
        while not self._ended.is_set():
            found = self._read()
            if found is None:  # the tool is absent, or does not say: it will not later
                return
            with self._lock:
                self._values.append(found)
                self._newest = (time.monotonic(), found)
            self._ended.wait(self._every)
