"""What keeps a run honest: no step on a non-finite number, and a stop that loses nothing.

A step whose loss or gradient norm is not finite never reaches the weights. The numbers judged are already
reduced over ranks, so that every rank reaches the same verdict. SIGINT and SIGTERM only raise a flag: the
loop finishes its step, saves and leaves; a second SIGINT interrupts at once. A signal to any rank stops all.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from pydantic import PositiveInt

from fullweight.core.config import Config
from fullweight.core.errors import TrainingError

_SAME_REQUEST_SECONDS = 1.0


class GuardConfig(Config):
    """What to do with a step whose loss or gradient norm is not finite.

    `stop` ends the run before the weights change; `skip` drops the step, records it and goes on, until
    `max_skips` in a row.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    max_skips: PositiveInt = 5


class Guard:
    """Judges each step's numbers and counts the steps skipped in a row."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skips_in_a_row = 0

    def refusal(self, losses: dict[str, float], grad_norm: float) -> str | None:
        """Why the step must not be applied, or None. `losses` and `grad_norm` are global values."""
        bad = [f"{name} loss {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not math.isfinite(grad_norm):
            bad.append(f"gradient norm {grad_norm}")
        if not bad:
            self.skips_in_a_row = 0
            return None
        self.skips_in_a_row += 1
        return ", ".join(bad)

    def enforce(self, step: int, refusal: str) -> None:
        """Raise TrainingError unless the policy says to skip."""
        limit = 0 if self.config.non_finite == "stop" else self.config.max_skips
        if self.skips_in_a_row <= limit:
            return
        again = f" ({limit} steps before it were skipped too)" if limit else ""
        raise TrainingError(
            f"step {step}: {refusal}, expected finite numbers{again}; the weights were not changed. Lower "
            "optimizer.learning_rate or optimizer.clip_norm, use train.precision=fp32 to find the cause, or set "
            "guard.non_finite=skip to drop such steps"
        )


class StopRequest:
    """Whether a signal asked the run to end after the current step.

    A second SIGINT raises KeyboardInterrupt, unless it comes within a second of the first signal: a launcher and
    a scheduler may both pass on what was asked once.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def requested(self) -> bool:
        return self._asked_at is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if os.environ.get("RANK", "0") == "0":
                # Not print: the signal may have come inside of one.
                os.write(2, b"\nstopping after this step and saving; Ctrl-C again stops at once, unsaved\n")
        elif number == signal.SIGINT and now - self._asked_at > _SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM inside the block; the previous handlers come back after it."""
        previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
