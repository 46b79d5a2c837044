"""What this process is doing, for whoever has to say why a run stands still.

The training thread notes each phase as it enters it: one assignment, no lock, no cost. Threads that watch
(`parallel/watch.py`) read it. A number that grows with every note tells standing still from moving on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

STEP_PHASES = ("data", "forward", "backward", "optimizer")
"""Phases of a training step, in order; everything else happens between steps."""
PHASES = ("set-up", *STEP_PHASES, "evaluation", "checkpoint", "export", "ending")


@dataclass(frozen=True)
class Place:
    """Where the training thread is: `step` counts from 1, 0 before the first; `began` is `time.monotonic`."""

    phase: str
    detail: str
    step: int
    count: int  # notes so far
    steps_begun: int  # by this process
    began: float

    @property
    def in_step(self) -> bool:
        """Whether this is part of a training step."""
        return self.phase in STEP_PHASES

    def __str__(self) -> str:
        """
        >>> str(Place("forward", "micro-batch 2", 7, 31, 4, 0.0))
        'forward (micro-batch 2) of step 7'
        """
        detail = f" ({self.detail})" if self.detail else ""
        where = f" of step {self.step}" if self.in_step else f" after step {self.step}" if self.step else ""
        return f"{self.phase}{detail}{where}"


_place = Place("set-up", "", 0, 0, 0, time.monotonic())


def enter(phase: str, detail: str = "") -> None:
    """Note that a phase begins."""
    assert phase in PHASES, phase
    global _place  # noqa: PLW0603
    _place = Place(phase, detail, _place.step, _place.count + 1, _place.steps_begun, time.monotonic())


def begin_step(step: int) -> None:
    """Note that training step `step` begins, with its data."""
    global _place  # noqa: PLW0603
    _place = Place("data", "", step, _place.count + 1, _place.steps_begun + 1, time.monotonic())


def now() -> Place:
    """The last note."""
    return _place
