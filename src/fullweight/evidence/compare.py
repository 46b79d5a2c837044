"""Twin runs side by side: where their losses part, and which is faster.

A side is one run or several of one recipe with other seeds. Losses are compared on the steps that both sides have:
the relative difference |b - a| / |a| of the loss, after a running mean over `window` steps where asked for. With
one run a side the verdict looks at every step. With several seeds on both it looks at the end: the 95 % interval
(Welch's t) of the difference of the mean over the last tenth of the steps, and `equivalent` means that the whole
interval lies within the tolerance (two one-sided tests at 2.5 %), so that noise alone can never prove equality.

A difference says that two runs are not the same, not which is wrong. Equal curves say little of the weights:
`parting.py` compares those, where both runs kept a checkpoint of one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fullweight.core.errors import DataError
from fullweight.evidence.curves import HELD_OUT, LOSS, WALL, Curve, Series

CONFIDENCE = 0.95
_LAST = 0.1  # share of the common steps that the end of training is judged on


class Verdict(StrEnum):
    """What can be said of two sides."""

    identical = "identical"  # every common number of every common loss has the same bits
    equivalent = "equivalent"
    different = "different"
    undecided = "undecided"  # several seeds, and their spread is too wide for the tolerance


@dataclass(frozen=True)
class Side:
    """One run, or several of one recipe with other seeds."""

    name: str
    curves: tuple[Curve, ...]

    def mean(self, metric: str) -> Series | None:
        """The mean over the runs on the steps that all of them have; None where a run has none."""
        found = [curve.series[metric] for curve in self.curves if metric in curve.series]
        if len(found) < len(self.curves):
            return None
        steps = reduce(np.intersect1d, (one.steps for one in found))
        return Series(steps, np.mean([_at(one, steps) for one in found], axis=0))


@dataclass(frozen=True)
class Interval:
    """The geometric mean over seeds; `low` and `high` bound it at 95 %.

    They are None with a single run, and where a value is 0, which has no logarithm.
    """

    mean: float
    low: float | None
    high: float | None
    num_runs: int


@dataclass(frozen=True)
class Difference:
    """How one number of side b differs from side a's on `num_steps` common steps."""

    metric: str
    num_steps: int
    first_unequal: int | None  # step
    first_beyond: int | None  # step at which the relative difference first exceeds the tolerance
    largest: float  # relative
    largest_at: int  # step
    mean: float  # relative


@dataclass(frozen=True)
class EndDifference:
    """Difference of the ends, b - a relative to a, over seeds, with its 95 % interval."""

    relative: float
    low: float
    high: float


@dataclass(frozen=True)
class Costs:
    """What a side took. Of every run the median step counts, without the first, which pays for warm-up."""

    step_seconds: Interval | None
    tokens_per_second: Interval | None
    mfu: Interval | None
    joules_per_token: Interval | None
    seconds_to_target: Interval | None  # None: some run never got there, or has no clock
    steps_to_target: Interval | None


@dataclass(frozen=True)
class Pair:
    """Side b beside side a."""

    a: str
    b: str
    differences: list[Difference]  # the losses first
    end: EndDifference | None  # with several seeds on both sides
    verdict: Verdict
    told: str


@dataclass(frozen=True)
class Comparison:
    """All sides; each is compared with the first."""

    tolerance: float
    window: int
    target: float | None  # loss that `seconds_to_target` is about
    target_metric: str
    costs: dict[str, Costs]
    pairs: list[Pair]


def compare(
    sides: Sequence[Side], *, tolerance: float = 0.01, window: int = 1, target: float | None = None
) -> Comparison:
    """Compare every side with the first. Raises DataError when two sides share no step."""
    metric = HELD_OUT if all(side.mean(HELD_OUT) is not None for side in sides) else LOSS
    if target is None:
        target = _common_target(sides, metric, window)
    costs = {side.name: _costs(side, target, metric, window) for side in sides}
    pairs = [_pair(sides[0], other, tolerance, window) for other in sides[1:]]
    return Comparison(tolerance, window, target, metric, costs, pairs)


def aligned(a: Side, b: Side, metric: str, window: int = 1) -> tuple[Series, Series] | None:
    """Both sides' means on their common steps, smoothed; None where either has no such number."""
    left, right = a.mean(metric), b.mean(metric)
    if left is None or right is None:
        return None
    steps = np.intersect1d(left.steps, right.steps)
    return Series(steps, _smooth(_at(left, steps), window)), Series(steps, _smooth(_at(right, steps), window))


def relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|b - a| / |a|; equal numbers, infinities and NaNs too, differ by 0, and anything else from 0 by inf."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.abs(b - a) / np.abs(a)
    return np.where(same, 0.0, np.where(np.isnan(found), np.inf, found))


def interval(values: Sequence[float]) -> Interval:
    """Geometric mean of positive numbers and, of two or more, its interval by Student's t of the logarithms.

    Times, rates and energies vary by factors. Student's t of the numbers themselves reaches below zero with
    two or three seeds; of their logarithms it cannot.
    """
    array = np.asarray(values, dtype=np.float64)
    assert (array >= 0).all(), "costs are no negative numbers"
    if len(array) < 2 or not array.all():
        return Interval(float(stats.gmean(array)) if len(array) > 1 else float(array[0]), None, None, len(array))
    logs = np.log(array)
    middle = float(logs.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(array))


def _pair(a: Side, b: Side, tolerance: float, window: int) -> Pair:
    losses = [name for name in a.curves[0].losses if name in b.curves[0].losses]
    others = [HELD_OUT, "grad_norm", "learning_rate", "tokens"]
    differences = [d for name in (*losses, *others) if (d := _difference(a, b, name, tolerance, window))]
    if not differences or differences[0].metric != LOSS:
        raise DataError(f"{a.name} and {b.name} have no step in common; compare runs that cover the same steps")
    end = _end(a, b)
    verdict, told = _judge(differences, len(losses), end, tolerance, window)
    return Pair(a.name, b.name, differences, end, verdict, told)


def _difference(a: Side, b: Side, metric: str, tolerance: float, window: int) -> Difference | None:
    raw, both = aligned(a, b, metric), aligned(a, b, metric, window)
    if raw is None or both is None or not len(raw[0]):
        return None
    steps = raw[0].steps
    unequal = relative(raw[0].values, raw[1].values) > 0
    apart = relative(both[0].values, both[1].values)
    worst = int(np.argmax(apart))
    return Difference(
        metric,
        num_steps=len(steps),
        first_unequal=_first(steps, unequal),
        first_beyond=_first(steps, apart > tolerance),
        largest=float(apart[worst]),
        largest_at=int(steps[worst]),
        mean=float(apart.mean()),
    )


def _end(a: Side, b: Side) -> EndDifference | None:
    """Welch's interval of the difference of the last tenth, or None without seeds on both sides."""
    if min(len(a.curves), len(b.curves)) < 2:
        return None
    both = aligned(a, b, LOSS)
    assert both is not None
    last = both[0].steps[-max(1, round(_LAST * len(both[0]))) :]
    left, right = ([float(_at(c.series[LOSS], last).mean()) for c in side.curves] for side in (a, b))
    base = float(np.mean(left))
    found = stats.ttest_ind(right, left, equal_var=False).confidence_interval(CONFIDENCE)
    middle = (float(np.mean(right)) - base) / abs(base)
    if math.isnan(found.low):  # no spread at all on either side
        return EndDifference(middle, middle, middle)
    return EndDifference(middle, float(found.low) / abs(base), float(found.high) / abs(base))


def _judge(
    differences: Sequence[Difference], num_losses: int, end: EndDifference | None, tolerance: float, window: int
) -> tuple[Verdict, str]:
    losses, loss = differences[:num_losses], differences[0]
    steps = f"{loss.num_steps} common step{'s' if loss.num_steps > 1 else ''}"
    if end is None and all(d.first_unequal is None for d in losses):  # means over seeds may agree by chance
        return Verdict.identical, f"identical: {', '.join(d.metric for d in losses)} equal bit for bit on {steps}"
    share = f"{tolerance:.3g}"
    if end is not None:
        told = f"last tenth of {steps}: {end.relative:+.3g}, 95 % within [{end.low:+.3g}, {end.high:+.3g}]"
        if -tolerance <= end.low and end.high <= tolerance:
            return Verdict.equivalent, f"equivalent within {share} of the loss ({told})"
        if end.low > tolerance or end.high < -tolerance:
            return Verdict.different, f"differs by more than {share} of the loss ({told})"
        return Verdict.undecided, f"undecided at {share}: more seeds would narrow the interval ({told})"
    smoothed = f", running mean of {window}" if window > 1 else ""
    worst = max(losses, key=lambda d: d.largest)
    if all(d.first_beyond is None for d in losses):
        told = f"largest {worst.largest:.3g}, {worst.metric} at step {worst.largest_at}"
        first = min(d.first_unequal for d in losses if d.first_unequal is not None)
        return (
            Verdict.equivalent,
            f"equivalent within {share} on {steps}{smoothed} ({told}; first unequal at {first})",
        )
    first, name = min((d.first_beyond, d.metric) for d in losses if d.first_beyond is not None)
    told = f"largest {worst.largest:.3g}, {worst.metric} at step {worst.largest_at}, of {steps}{smoothed}"
    return Verdict.different, f"differs at step {first}: {name} by more than {share} ({told})"


def _common_target(sides: Sequence[Side], metric: str, window: int) -> float | None:
    """The lowest loss that every run reached: the worst of the runs' bests."""
    bests = []
    for side in sides:
        for curve in side.curves:
            values = _smooth(curve.series[metric].values, window)
            if not np.isfinite(values).any():
                return None
            bests.append(float(np.nanmin(values)))
    return max(bests)


def _costs(side: Side, target: float | None, metric: str, window: int) -> Costs:
    reached = [_reached(curve, target, metric, window) for curve in side.curves]
    steps = [float(found[0]) for found in reached if found is not None]
    seconds = [found[1] for found in reached if found is not None and found[1] is not None]
    everyone = len(side.curves)
    return Costs(
        step_seconds=_typical(side, "seconds"),
        tokens_per_second=_typical(side, "tokens_per_second"),
        mfu=_typical(side, "mfu"),
        joules_per_token=_energy(side),
        seconds_to_target=interval(seconds) if len(seconds) == everyone else None,
        steps_to_target=interval(steps) if len(steps) == everyone else None,
    )


def _typical(side: Side, metric: str) -> Interval | None:
    found = [curve.series[metric].values for curve in side.curves if metric in curve.series]
    values = [float(np.nanmedian(v[1:] if len(v) > 1 else v)) for v in found]
    return interval(values) if len(values) == len(side.curves) and np.isfinite(values).all() else None


def _energy(side: Side) -> Interval | None:
    """Joules of all steps over their tokens; None unless every step of every run has its power."""
    values = []
    for curve in side.curves:
        watts, seconds, tokens = (curve.series.get(name) for name in ("watts", "seconds", "tokens"))
        if watts is None or seconds is None or tokens is None or len(watts) < len(seconds):
            return None
        values.append(float((watts.values * seconds.values).sum() / tokens.values.sum()))
    return interval(values)


def _reached(curve: Curve, target: float | None, metric: str, window: int) -> tuple[int, float | None] | None:
    """(step, seconds since the start) at which the loss is first at or below the target."""
    series = curve.series[metric]
    there = np.zeros(len(series), dtype=bool) if target is None else _smooth(series.values, window) <= target
    step = _first(series.steps, there)
    if step is None:
        return None
    clock = curve.series.get(WALL)
    if clock is None:
        return step, None
    return step, float(np.interp(step, np.append(0, clock.steps), np.append(0.0, clock.values)))


def _at(series: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    return series.values[np.searchsorted(series.steps, steps)]


def _first(steps: NDArray[np.int64], true: NDArray[np.bool_]) -> int | None:
    return int(steps[np.argmax(true)]) if true.any() else None


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and the `window - 1` before it, of fewer at the start."""
    if window == 1:
        return values
    return np.array([values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)])
