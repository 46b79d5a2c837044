"""Settings of a launch: how long ranks wait for each other before they say that something is wrong.

Imports no torch.
"""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from fullweight.core.config import Config

_GROUP_MARGIN_SECONDS = 120.0


class LaunchConfig(Config):
    """Bounds on standing still; none of them changes what a run computes."""

    join_seconds: PositiveFloat = Field(600.0, description="until every rank must have come")
    stall_seconds: PositiveFloat = Field(
        300.0, description="a rank that spends longer in one phase of a training step has stalled"
    )
    setup_seconds: PositiveFloat = Field(
        3600.0, description="the same for set-up, the first step, evaluations, saves and the export"
    )
    straggler_ratio: float = Field(
        3.0, gt=1, description="warn of a rank that works so many times longer than the others' median"
    )

    @property
    def collective_timeout_seconds(self) -> float:
        """Timeout of the process group: above both bounds, which report more, and a last resort."""
        return max(self.stall_seconds, self.setup_seconds) + _GROUP_MARGIN_SECONDS
