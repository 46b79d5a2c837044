"""In every precision and with every optimiser: rounding stays within the bound, and small frauds do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.audit.separation import CASES, NEAR_TIES, measured

from fullweight.audit.replay import Verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "optimizer", "samples"),
    [*((*case, None) for case in CASES), ("fp32", "muon", NEAR_TIES), ("fp32", "adamw", NEAR_TIES)],
)
def test_rounding_and_fraud_lie_apart(
    precision: str, optimizer: str, samples: Path | None, tmp_path: Path
) -> None:
    """The default bound is above the honest window and below each of the others, also where entries nearly tie."""
    honest, *others = measured(precision, optimizer, tmp_path / "run", samples).values()
    assert honest.verdict is Verdict.verified, honest.reason
    assert honest.stack, "with other threads"
    for found in others:
        assert found.verdict is Verdict.refuted, found.reason
        assert found.distance is not None
        assert honest.distance is not None
        assert found.distance.effect > 4 * honest.distance.effect
