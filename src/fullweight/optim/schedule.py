"""The learning-rate schedule: warm-up, a constant stretch, a decay; a pure function of the step.

Steps count from 0. Warm-up of w steps gives (step + 1) / w, so the first step already moves and step w - 1
is the first at the peak. The decay reaches `final_ratio` at the last step and stays there beyond it. With
`decay_fraction` below 1 the rate holds at the peak and decays only near the end, as DeepSeek-V4 was
pre-trained (report, section 4.2: linear warm-up, constant for most, cosine near the end).

Left out: restarts and schedules counted in tokens.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError


class ScheduleConfig(Config):
    """Shape of the learning rate over a run, relative to its peak."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0, description="steps of warm-up; excludes warmup_fraction")
    warmup_fraction: float | None = Field(None, ge=0, le=1, description="share of the run's steps, rounded up")
    decay_fraction: float = Field(1.0, gt=0, le=1, description="share of the run, at its end, that decays")
    final_ratio: float = Field(0.1, ge=0, le=1, description="end / peak; a constant schedule ignores it")

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("warmup_steps and warmup_fraction are both set; keep one of them")
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        """Warm-up steps in a run of `num_steps`; raises ConfigError when they do not fit into it."""
        if num_steps < 1:
            raise ConfigError(f"a run needs at least one step, found {num_steps}")
        # 1e-9 keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        fractional = math.ceil((self.warmup_fraction or 0.0) * num_steps - 1e-9)
        steps = fractional if self.warmup_steps is None else self.warmup_steps
        if steps > num_steps:
            raise ConfigError(
                f"schedule.warmup_steps is {steps} and the run has {num_steps} steps, so the peak rate "
                "is never reached; lower warmup_steps, or set warmup_fraction instead"
            )
        return steps


def lr_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Learning rate at `step` (from 0) of a run of `num_steps`, divided by its peak.

    >>> [lr_factor(ScheduleConfig(kind="linear", warmup_steps=2, final_ratio=0.0), s, 4) for s in range(5)]
    [0.5, 1.0, 0.5, 0.0, 0.0]
    """
    warmup = config.num_warmup_steps(num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    last = num_steps - 1
    # The last step at the peak: the end of warm-up, or where the constant stretch ends if that is later.
    peak = max(warmup - 1, 0, last - math.ceil(config.decay_fraction * num_steps - 1e-9))
    if step <= peak:
        return 1.0
    progress = min((step - peak) / (last - peak), 1.0) if last > peak else 1.0
    remaining = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_ratio + (1.0 - config.final_ratio) * remaining
