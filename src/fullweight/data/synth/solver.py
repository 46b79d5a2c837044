"""Exact optima of small programs: HiGHS finds them, rational arithmetic accepts them.

HiGHS works in floating point, and a task's answer must be exact and have one plan, the same on every
platform. So a linear program's optimum is accepted only with a proof in rationals: primal and dual points
are feasible, their values are equal, and strict complementarity leaves one optimal point. An integer
program's plan is checked in integers, and a second program, which looks for the optimal plan farthest from
the first, must find none; that no plan is better rests on HiGHS, and on the tests, which enumerate.
Everything else gives None and the caller draws other numbers.

All data are integers and all variables are at least 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

# The largest denominator looked for: coefficients are below 100 and programs have at most three rows.
_MAX_DENOMINATOR = 10_000


@dataclass(frozen=True)
class Program:
    """Minimise or maximise objective . x subject to rows . x <= limits, x >= 0, integer data.

    A `>=` row is written with its signs reversed, an equality as two rows. `upper` bounds each variable and
    makes it integer; without it the variables are continuous.
    """

    objective: Sequence[int]
    rows: Sequence[Sequence[int]]
    limits: Sequence[int]
    maximise: bool = False
    upper: Sequence[int] | None = None

    @property
    def costs(self) -> list[int]:
        """The objective as a minimisation."""
        return [-c if self.maximise else c for c in self.objective]


@dataclass(frozen=True)
class Optimum:
    """The one optimal plan and its objective value, both exact."""

    plan: tuple[Fraction, ...]
    value: Fraction


def solve(program: Program) -> Optimum | None:
    """The program's optimum; None unless it exists, is unique and exact."""
    found = _solve_continuous(program) if program.upper is None else _solve_integer(program, program.upper)
    if found is None:
        return None
    plan = tuple(Fraction(x) for x in found)
    return Optimum(plan, _dot(program.objective, plan))


def _dot(weights: Sequence[int], values: Sequence[Fraction | int]) -> Fraction:
    return sum((Fraction(w * v) for w, v in zip(weights, values, strict=True)), Fraction(0))


def _rational(values: Sequence[float]) -> list[Fraction]:
    return [Fraction(float(v)).limit_denominator(_MAX_DENOMINATOR) for v in values]


def _solve_continuous(program: Program) -> list[Fraction] | None:
    costs, rows, limits = program.costs, program.rows, program.limits
    result = linprog(costs, A_ub=rows, b_ub=limits, method="highs-ds")
    if result.status != 0:
        return None
    plan = _rational(result.x)
    prices = _rational(-result.ineqlin.marginals)
    slack = [limit - _dot(row, plan) for row, limit in zip(rows, limits, strict=True)]
    reduced = [cost + _dot([row[j] for row in rows], prices) for j, cost in enumerate(costs)]
    if min(plan + prices + slack + reduced) < 0 or _dot(costs, plan) != -_dot(limits, prices):
        return None
    strict = all((x > 0) != (d > 0) for x, d in zip(plan + prices, reduced + slack, strict=True))
    tight = [[row[j] for j, x in enumerate(plan) if x > 0] for row, y in zip(rows, prices, strict=True) if y > 0]
    num_used = sum(x > 0 for x in plan)
    # With strict complementarity the optimal points are the solutions of the tight rows in the used
    # variables; full column rank leaves one.
    unique = strict and num_used > 0 and len(tight) >= num_used and np.linalg.matrix_rank(tight) == num_used
    return plan if unique else None


def _solve_integer(program: Program, upper: Sequence[int]) -> list[int] | None:
    plan = _integer_plan(
        *(np.asarray(x, dtype=float) for x in (program.costs, program.rows, program.limits, upper))
    )
    if plan is None or not _fits(program, upper, plan) or not _is_unique(program, upper, plan):
        return None
    return plan


def _integer_plan(costs: np.ndarray, rows: np.ndarray, limits: np.ndarray, upper: np.ndarray) -> list[int] | None:
    result = milp(
        costs,
        constraints=LinearConstraint(rows, -np.inf, limits),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, upper),
        options={"mip_rel_gap": 0},
    )
    return [round(float(x)) for x in result.x] if result.status == 0 else None


def _fits(program: Program, upper: Sequence[int], plan: Sequence[int]) -> bool:
    return all(0 <= x <= u for x, u in zip(plan, upper, strict=True)) and all(
        sum(a * x for a, x in zip(row, plan, strict=True)) <= limit
        for row, limit in zip(program.rows, program.limits, strict=True)
    )


def _is_unique(program: Program, upper: Sequence[int], plan: Sequence[int]) -> bool:
    """Whether no other plan is as good: x = plan + up - down, maximise sum(up + down).

    A binary per variable lets it move one way only, so the sum is the true distance from the plan.
    """
    costs, rows, limits, top, start = (
        np.asarray(x, dtype=float) for x in (program.costs, program.rows, program.limits, upper, plan)
    )
    n = len(plan)
    room = top - start
    eye, zero = np.eye(n), np.zeros((n, n))
    moved = np.block(
        [
            [rows, -rows, np.zeros_like(rows)],
            [costs, -costs, np.zeros(n)],
            [eye, zero, -np.diag(room)],
            [zero, eye, np.diag(start)],
        ]
    )
    bounds = np.concatenate([limits - rows @ start, np.zeros(1 + n), start])
    distance = np.concatenate([-np.ones(2 * n), np.zeros(n)])
    farthest = _integer_plan(distance, moved, bounds, np.concatenate([room, start, np.ones(n)]))
    return farthest is not None and not any(farthest[: 2 * n])
