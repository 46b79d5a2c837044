"""Whether a matrix's update is of low rank: what names adapters that were merged and passed as full training.

A merged adapter (LoRA) of rank r changes a matrix by a product of r columns and r rows, so all but rounding of the
change lies in r directions. An update by Muon spreads over all directions, one by AdamW, which is taken entry by
entry, over most. What is looked at is the share of the change's norm outside its `limit` largest directions; and
the same of the change less c * before, because decoupled weight decay scales a matrix and would hide an adapter. c
is fitted where an adapter would have no part: outside the `limit` largest directions of the change less its
projection.

`limit` is 64, or half the smaller side of a smaller matrix. Up to EXACT_SIDE the singular values are exact (fp64);
above, a randomised range finder with one power iteration gives no less than the true share (Halko, Martinsson and
Tropp, 2011, algorithms 4.3 and 4.4), so a full update is never called low. A share below TOLERANCE is low rank:
runs of the presets `tiny` and `small` had 0.010 (the head, whose unused rows all move alike) to 0.9 in full
updates, and a merged adapter that changes a matrix by a hundredth of its norm leaves 0.00001, what rounding to
fp32 adds. A change so small that this rounding blurs it, below some 0.00001 of its matrix, is not judged, and
neither are matrices with a side below LEAST_SIDE: hyper-connections of identical streams get gradients of low rank
by nature.

Left out: an adapter together with noise on all entries. Noise above TOLERANCE of the change passes; only running
steps again (replay) tells.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 64
"""Highest rank of an adapter that is looked for."""
TOLERANCE = 0.001
"""Share of an update's norm (not of its square) that a low-rank one may have outside its directions."""
EXACT_SIDE = 256
LEAST_SIDE = 32
_SPARE = 16  # columns of the range finder beyond the rank that it looks for
_ROWS = 256
_CHANCE = 4  # standard deviations of the cosine of two matrices that have nothing to do with each other
_UNIT = 2.0**-24  # relative rounding error of an fp32 weight
_MOST_NOISE = 0.01


@dataclass(frozen=True)
class RankTest:
    """`rank` is the least number of directions that hold all but TOLERANCE of the update; None: above `limit`.

    `residual` is the share of the update's norm outside its `limit` largest directions.
    """

    limit: int
    rank: int | None
    residual: float


def limit_of(rows: int, columns: int) -> int:
    """The highest rank that is told from a full one in a matrix of this shape; 0: it is not judged.

    >>> limit_of(2048, 4096), limit_of(96, 192), limit_of(24, 16384)
    (64, 48, 0)
    """
    smaller = min(rows, columns)
    return min(MOST, smaller // 2) if smaller >= LEAST_SIDE else 0


@torch.no_grad()
def rank_test(before: Tensor, after: Tensor, name: str = "") -> RankTest | None:
    """Judge the change of a matrix [rows, columns] (fp32 or fp64, finite).

    None where it is not judged: a vector, a small side, no change, or one that rounding blurs. The same tensors
    and name give the same answer.
    """
    limit = limit_of(before.shape[0], before.shape[-1]) if before.dim() == 2 else 0
    if not limit:
        return None
    if before.shape[0] > before.shape[1]:
        before, after = before.T, after.T
    change = after - before
    size = _norm(change)
    if size == 0 or not math.isfinite(size):
        return None
    tolerance = max(TOLERANCE, 2 * _UNIT * _norm(after) / size) if after.dtype == torch.float32 else TOLERANCE
    if tolerance > _MOST_NOISE:
        return None
    outside = _tails(change, limit, name)
    along = abs(_product(change, before)) / (size * (_norm(before) or 1.0)) + _CHANCE / math.sqrt(change.numel())
    if tolerance < outside[limit] <= along:  # a scaling hides no more than there is of it
        scaled = _tails(_without_scaling(change, before, limit, name), limit, name)
        outside = min(outside, scaled, key=lambda tails: tails[limit])
    rank = next((r for r in range(limit + 1) if outside[r] <= tolerance), None)
    return RankTest(limit, rank, outside[limit])


def _without_scaling(change: Tensor, before: Tensor, limit: int, name: str) -> Tensor:
    """`change` less the multiple of `before` that is in it beside an update of low rank."""
    basis = _directions(change - _along(change, before, None), limit, name)
    return change - _along(change, before, basis)


def _along(change: Tensor, before: Tensor, basis: Tensor | None) -> Tensor:
    """The multiple of `before` that fits `change` best outside the columns of `basis`."""
    inside, own = _product(change, before), _product(before, before)
    if basis is not None:
        left, right = basis.T @ change, basis.T @ before
        inside, own = inside - _product(left, right), own - _product(right, right)
    return before * (inside / own if own > 0 else 0.0)


def _directions(change: Tensor, limit: int, name: str) -> Tensor:
    """Orthonormal columns [rows, k] that span the `limit` largest directions of a wide matrix, k not below it."""
    if min(change.shape) <= EXACT_SIDE:
        wide = change.double()
        return torch.linalg.eigh(wide @ wide.T)[1][:, -limit:].to(change.dtype)
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    wide = change / change.abs().max()  # squares of tiny changes leave fp32's range
    start = torch.randn(change.shape[1], limit + _SPARE, generator=generator).to(change.dtype)
    basis = torch.linalg.qr(wide @ start)[0]
    return torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]


def _tails(change: Tensor, limit: int, name: str) -> list[float]:
    """Share of the norm outside the r largest directions, for r = 0, 1, ... up to `limit` at least."""
    rest = 0.0
    if min(change.shape) > EXACT_SIDE:
        basis = _directions(change, limit, name)
        inside = basis.T @ change
        rest = _norm(change - basis @ inside) ** 2
        change = inside
    wide = change.double()
    energies = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0)  # smallest first
    below = torch.cat((energies.cumsum(0).flip(0), energies.new_zeros(1))) + rest
    return (below / below[0]).sqrt().tolist() if below[0] > 0 else [0.0] * len(below)


def _product(a: Tensor, b: Tensor) -> float:
    """Sum of the products of entries, in fp64, some rows at a time."""
    pairs = zip(a.split(_ROWS), b.split(_ROWS), strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
