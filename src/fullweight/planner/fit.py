"""The cost model's few coefficients, fitted on published runs, and how well they predict runs they have not seen.

All coefficients are global: none for a run, a model or a chip. They are fitted on the logarithm of the step time,
with a loss that grows linearly beyond 10 % so that single odd rows do not decide, and a weak pull to values that
are usual (`PRIOR`), without which terms that no run shows would be arbitrary. A group of many rows weighs less
than its number, routed models more than dense ones, since they are what the planner is for.

Cross-validation leaves out one group at a time (`published.py`), and, harder, one document at a time. Beside it
stands a null model: one MFU for each chip and matrix type, the geometric mean of its runs; under cross-validation
it takes the runs of other groups on that chip and type, or all other runs where there is none. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from fullweight.planner.cost import Coefficients, Parts, parts_of, step_time
from fullweight.planner.job import Job
from fullweight.planner.published import Case

PRIOR = Coefficients()
_BOUNDS = {
    "gemm": (0.4, 0.95),
    "gemm_fp8": (0.3, 0.95),
    "gemm_fp4": (0.15, 0.95),
    "experts": (0.2, 1.0),
    "attention": (0.1, 0.95),
    "watts": (0.2, 1.5),
    "memory": (0.1, 1.0),
    "narrow": (1.0, 2000.0),
    "host_ms": (0.1, 20.0),
    "fused": (0.2, 1.0),
    "tensor_exposed": (0.02, 3.0),
    "expert_exposed": (0.02, 10.0),
    "data_exposed": (0.01, 2.0),
}
_PULL, _ROUTED_WEIGHT, _LINEAR_FROM = 0.2, 2.0, 0.1


@dataclass(frozen=True)
class Judgement:
    """One case: predicted over measured, minus 1, under three models."""

    case: Case
    fitted: float
    unseen: float  # with the case's group left out
    source_unseen: float  # with all of the case's document left out
    null: float
    null_unseen: float


@dataclass(frozen=True)
class Prediction:
    """One case that had no part in the fit. Errors are predicted over measured, minus 1."""

    case: Case
    seconds: float
    error: float
    null: float


@dataclass(frozen=True)
class Order:
    """Measured layouts of one model, chip, number of ranks and batch: the planner's first choice and ranks."""

    name: str
    num_layouts: int
    first_over_best: float  # measured time of the first choice over that of the best
    rank_correlation: float


class _Table:
    """All cases as arrays, one entry each."""

    def __init__(self, cases: Sequence[Case]) -> None:
        parts = [parts_of(case.job) for case in cases]
        self.parts = {f.name: np.array([getattr(p, f.name) for p in parts]) for f in fields(Parts)}
        self.measured = np.log([case.seconds for case in cases])
        self.groups = np.array([case.group for case in cases])
        self.mfu = np.log([case.mfu for case in cases])
        self.keys = np.array([f"{case.job.chip.name} {case.job.precision}" for case in cases])
        size = Counter(case.group for case in cases)
        routed = np.array([case.kind == "moe" for case in cases])
        self.weights = np.array([size[case.group] ** -0.25 for case in cases]) * np.where(
            routed, _ROUTED_WEIGHT, 1
        )

    def predicted(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Logarithms of step times."""
        names = Coefficients.names()
        coefficients = Coefficients(**dict(zip(names, np.exp(values), strict=True)))
        chosen = Parts(**{name: column[rows] for name, column in self.parts.items()})
        found: np.ndarray = np.log(step_time(chosen, coefficients).total)
        return found

    def fit(self, rows: np.ndarray) -> np.ndarray:
        """Logarithms of the coefficients that suit these rows."""
        names = Coefficients.names()
        low, high = (np.log([_BOUNDS[n][i] for n in names]) for i in (0, 1))
        prior = np.log([getattr(PRIOR, n) for n in names])

        def residuals(values: np.ndarray) -> np.ndarray:
            misses = (self.predicted(values, rows) - self.measured[rows]) * self.weights[rows]
            return np.concatenate((misses, _PULL * (values - prior)))

        start = np.clip(prior, low + 1e-6, high - 1e-6)
        solution = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=_LINEAR_FROM)
        found: np.ndarray = solution.x
        return found

    def unseen(self, groups: np.ndarray) -> np.ndarray:
        """What each case is missed by, as a logarithm, by a fit without its group."""
        found = np.zeros(len(groups))
        for group in sorted(set(groups)):
            inside = groups == group
            found[inside] = self.predicted(self.fit(~inside), inside) - self.measured[inside]
        return found


def fit(cases: Sequence[Case]) -> Coefficients:
    """The coefficients that suit all cases, to four digits."""
    table = _Table(cases)
    values = np.exp(table.fit(np.ones(len(cases), dtype=bool)))
    return Coefficients(**{n: float(f"{v:.4g}") for n, v in zip(Coefficients.names(), values, strict=True)})


def judge(cases: Sequence[Case], coefficients: Coefficients) -> list[Judgement]:
    """Every case under the given coefficients, under ones fitted without its group, and under the null models."""
    table = _Table(cases)
    everything = np.ones(len(cases), dtype=bool)
    given = np.log([getattr(coefficients, n) for n in Coefficients.names()])
    fitted = table.predicted(given, everything) - table.measured
    null, null_unseen = np.zeros(len(cases)), np.zeros(len(cases))
    source_unseen = table.unseen(np.array([case.source for case in cases]))
    unseen = table.unseen(table.groups)
    for group in sorted(set(table.groups)):
        inside = table.groups == group
        for i in np.flatnonzero(inside):
            alike = (table.keys == table.keys[i]) & ~inside
            null_unseen[i] = table.mfu[i] - table.mfu[alike if alike.any() else ~inside].mean()
    for key in set(table.keys):
        rows = table.keys == key
        null[rows] = table.mfu[rows] - table.mfu[rows].mean()
    columns = (np.exp(x) - 1 for x in (fitted, unseen, source_unseen, null, null_unseen))
    return [Judgement(case, *map(float, values)) for case, *values in zip(cases, *columns, strict=True)]


def predict(cases: Sequence[Case], coefficients: Coefficients, known: Sequence[Case]) -> list[Prediction]:
    """Cases under given coefficients, beside the null model of the runs that are known."""
    table = _Table(known)
    found = []
    for case in cases:
        seconds = step_time(parts_of(case.job), coefficients).total
        alike = table.keys == f"{case.job.chip.name} {case.job.precision}"
        null = np.log(case.mfu) - table.mfu[alike if alike.any() else slice(None)].mean()
        found.append(Prediction(case, seconds, seconds / case.seconds - 1, float(np.exp(null) - 1)))
    return found


def orders(judgements: Sequence[Judgement]) -> list[Order]:
    """Sets of measured layouts, at least two, of one job, by predictions that have not seen them."""
    sets: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        job = judgement.case.job
        name = (
            f"{judgement.case.source}: {job.work.name} on {job.ranks} {job.chip.name}, {job.global_batch} rows of "
            f"{job.sequence}, {judgement.case.recipe or job.precision}"
        )
        sets.setdefault(name, []).append(judgement)
    found = []
    for name, members in sets.items():
        num_layouts = len({_layout(j.case.job) for j in members})
        if num_layouts < 2:
            continue
        measured = np.array([j.case.seconds for j in members])
        predicted = measured * (1 + np.array([j.unseen for j in members]))
        first = measured[int(predicted.argmin())] / measured.min()
        correlation = float(spearmanr(predicted, measured).statistic)
        found.append(Order(name, num_layouts, float(first), correlation))
    return found


def _layout(job: Job) -> tuple[object, ...]:
    sizes = (job.tensor, job.context, job.pipeline, job.virtual, job.expert, job.micro_batch)
    return (*sizes, job.recompute, job.shard_parameters)


def mean_error(values: Sequence[float]) -> float:
    """Mean absolute relative error."""
    return float(np.abs(values).mean())


def interval(values: Sequence[float], share: float = 0.8) -> tuple[float, float]:
    """(low, high): measured over predicted, between which the middle `share` of the cases lie."""
    ratios = 1 / (1 + np.asarray(values))
    low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
