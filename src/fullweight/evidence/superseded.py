"""Which lines of a ledger the run went back behind, and which stand.

A `resume` names the step that the run went back to: lines before it of later steps are superseded. A `start` that
is not the first supersedes all before it. Both readers of ledgers ask here, the one that trusts its own run
(`ledger.py`) and the one that takes a stranger's (`lines.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

BEGINNINGS = ("start", "resume")
"""The events with which a segment begins."""


class Superseded:
    """Made from (line number, `what`, step) of every event that begins a segment, in order; memory is theirs."""

    def __init__(self, beginnings: Iterable[tuple[int, str, int]]) -> None:
        self._numbers: list[int] = []
        self._bounds: list[float] = []  # the least step that it or a later one goes back to
        for number, what, step in beginnings:
            self._numbers.append(number)
            self._bounds.append(step if what == "resume" else -math.inf)
        for i in reversed(range(len(self._bounds) - 1)):
            self._bounds[i] = min(self._bounds[i], self._bounds[i + 1])

    def __call__(self, number: int, step: int) -> bool:
        """Whether a line of `step` is superseded by a beginning that follows it."""
        following = bisect_right(self._numbers, number)
        return following < len(self._bounds) and step > self._bounds[following]
