"""The learning-rate schedule against values worked out by hand."""

import pytest

from fullweight.core.errors import ConfigError
from fullweight.optim.schedule import ScheduleConfig, lr_factor


def curve(num_steps: int, **values: object) -> list[float]:
    config = ScheduleConfig.resolve(values)
    return [lr_factor(config, step, num_steps) for step in range(num_steps)]


def test_linear_with_warmup_by_hand() -> None:
    """Two steps up, then four equal steps down from 1 to 0.2 at the last step."""
    values = curve(6, kind="linear", warmup_steps=2, final_ratio=0.2)
    assert values == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_without_warmup_by_hand() -> None:
    """Starts at the peak; quarter points of (1 + cos) / 2 between 1 and 0.1."""
    values = curve(5, kind="cosine", warmup_steps=0, final_ratio=0.1)
    expected = [1.0, 0.1 + 0.9 * 0.8535533906, 0.55, 0.1 + 0.9 * 0.1464466094, 0.1]
    assert values == pytest.approx(expected)


def test_constant_holds_the_peak() -> None:
    """No decay, whatever the final ratio, also beyond the end."""
    assert curve(4, kind="constant", warmup_steps=2, final_ratio=0.0) == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(ScheduleConfig(kind="constant"), 99, 4) == 1.0


def test_decay_only_near_the_end() -> None:
    """decay_fraction 0.25 of 8 steps: the last two steps decay, the rest hold the peak."""
    values = curve(8, kind="linear", warmup_steps=1, decay_fraction=0.25, final_ratio=0.0)
    assert values == pytest.approx([1, 1, 1, 1, 1, 1, 0.5, 0.0])


def test_long_warmup_shortens_the_decay() -> None:
    """Warm-up that reaches into the decay stretch is kept; the decay takes what is left."""
    values = curve(4, kind="linear", warmup_steps=3, final_ratio=0.0)
    assert values == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_one_step_and_steps_beyond_the_end(kind: str) -> None:
    """A run of one step takes it at the peak; every step beyond the end has the final ratio."""
    config = ScheduleConfig.resolve({"kind": kind, "final_ratio": 0.25})
    assert lr_factor(config, 0, 1) == 1.0
    assert [lr_factor(config, step, 1) for step in (1, 2, 1000)] == [0.25] * 3
    assert [lr_factor(config, step, 10) for step in (9, 10, 5000)] == pytest.approx([0.25] * 3)
    warm = ScheduleConfig.resolve({"kind": kind, "final_ratio": 0.25, "warmup_steps": 5})
    assert [lr_factor(warm, step, 5) for step in (3, 4, 5)] == [0.8, 1.0, 0.25]


@pytest.mark.parametrize(
    ("fraction", "num_steps", "expected"),
    [(0.0, 10, 0), (0.1, 30, 3), (0.1, 31, 4), (0.03, 5, 1), (1.0, 7, 7)],
)
def test_warmup_fraction_rounds_up(fraction: float, num_steps: int, expected: int) -> None:
    """A share of the run, rounded up to whole steps, without floating-point surprises."""
    assert ScheduleConfig(warmup_fraction=fraction).num_warmup_steps(num_steps) == expected


def test_mistakes_are_refused() -> None:
    """Two warm-ups, a warm-up longer than the run, and an empty run each say what is wrong."""
    with pytest.raises(ConfigError, match="keep one of them"):
        ScheduleConfig.resolve({"warmup_steps": 3, "warmup_fraction": 0.1})
    with pytest.raises(ConfigError, match="warmup_steps is 6 and the run has 5 steps"):
        lr_factor(ScheduleConfig(warmup_steps=6), 0, 5)
    with pytest.raises(ConfigError, match="at least one step"):
        lr_factor(ScheduleConfig(), 0, 0)
    with pytest.raises(ConfigError, match="did you mean 'final_ratio'"):
        ScheduleConfig.resolve({"final_ration": 0.1})
