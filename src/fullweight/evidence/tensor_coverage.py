"""What became of one published tensor: how much of it gradients reached, and how far it moved.

Counts are integers, so that a check can demand equality; norms are sums in fp64. A change is a change of value (0
and -0 are equal, NaN differs from everything), in three readings: of the fp32 master, of the master rounded to
BF16, and of what a reader of the export gets back, FP8 and FP4 scales included. Under a small learning rate the
first can be all and the last next to nothing (facts in docs/evidence.md): the claim that weights were trained is
about masters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint.folder import row_chunks
from fullweight.evidence.kinds import expert_of, kind_of, layer_of
from fullweight.evidence.low_rank import RankTest, rank_test

AsStored = Callable[[Tensor, int], Tensor]
"""Rows (fp32) and the number of the first one to what a reader of the export gets back."""


@dataclass
class Sums:
    """What adds up over elements. None: cannot be had."""

    elements: int = 0
    reached: int = 0  # elements whose moments are not zero
    changed_master: int | None = 0
    changed_bf16: int | None = 0
    changed_export: int | None = 0
    non_finite: int = 0
    squared_change: float | None = 0.0
    squared_first: float | None = 0.0
    largest_change: float | None = 0.0

    def add(self, other: Sums) -> None:
        """Take in the sums of other elements."""
        self.elements += other.elements
        self.reached += other.reached
        self.non_finite += other.non_finite
        for name in ("changed_master", "changed_bf16", "changed_export", "squared_change", "squared_first"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, None if mine is None or theirs is None else mine + theirs)
        largest = (self.largest_change, other.largest_change)
        self.largest_change = None if None in largest else max(x for x in largest if x is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, the L2 norm of the change, its ratio to the first weights', the largest change."""
        change, first = self.squared_change, self.squared_first
        return {
            "elements": self.elements,
            "reached": self.reached,
            "changed_master": self.changed_master,
            "changed_bf16": self.changed_bf16,
            "changed_export": self.changed_export,
            "non_finite": self.non_finite,
            "l2_change": None if change is None else _short(change**0.5),
            "relative_change": None if change is None or not first else _short((change / first) ** 0.5),
            "largest_change": None if self.largest_change is None else _short(self.largest_change),
        }


@dataclass(frozen=True)
class TensorCoverage:
    """One published tensor; `expert` is the routed expert whose matrix it is."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    sums: Sums
    rank: RankTest | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def layer(self) -> str:
        return layer_of(self.name)

    @property
    def expert(self) -> int | None:
        return expert_of(self.name)

    def as_dict(self) -> dict[str, Any]:
        rank = None if self.rank is None else {**asdict(self.rank), "residual": _short(self.rank.residual)}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "trains": self.trains,
            **self.sums.as_dict(),
            "rank": rank,
        }


@torch.no_grad()
def cover(
    name: str,
    now: Tensor,
    first: Tensor | None,
    reached: Tensor | None,
    trains: bool,
    as_stored: AsStored | None,
) -> TensorCoverage:
    """Measure a published tensor `now` [rows, ...] fp32 or fp64, beside what it was (`first`, None: unknown).

    `reached` is bool of the same shape, None where there are no moments; `as_stored` None: the export is unknown.
    """
    total = Sums()
    for start, stop in row_chunks(tuple(now.shape), 0, now.shape[0]):
        before = None if first is None else first[start:stop].to(now.dtype)
        total.add(_chunk(now[start:stop], before, as_stored, start))
    total.reached = 0 if reached is None else int(reached.sum())
    rank = None
    if trains and first is not None and not total.non_finite:
        rank = rank_test(first.to(now.dtype), now, name)
    return TensorCoverage(name, tuple(now.shape), trains, total, rank)


def _chunk(now: Tensor, before: Tensor | None, as_stored: AsStored | None, start: int) -> Sums:
    elements, non_finite = now.numel(), now.numel() - int(torch.isfinite(now).sum())
    if before is None:
        return Sums(elements, 0, None, None, None, non_finite, None, None, None)
    changed = int((now != before).sum())
    changed_bf16 = int((now.bfloat16() != before.bfloat16()).sum()) if changed else 0
    exported: int | None = 0 if as_stored is not None else None
    if as_stored is not None and changed:
        # what is not finite has no code in FP8 or FP4
        exported = None if non_finite else _changed_stored(now, before, as_stored, start)
    change = (now - before).double()
    finite = non_finite == 0
    return Sums(
        elements,
        0,
        changed,
        changed_bf16,
        exported,
        non_finite,
        float(change.square().sum()) if finite else None,
        float(before.double().square().sum()),
        float(change.abs().max()) if finite and elements else 0.0 if finite else None,
    )


def _changed_stored(now: Tensor, before: Tensor, as_stored: AsStored, start: int) -> int:
    return int((as_stored(now.float(), start) != as_stored(before.float(), start)).sum())


def _short(value: float) -> float:
    """Six significant digits: more would be noise of the order of summation."""
    return float(f"{value:.6g}")
