"""Packing: which samples share a row of T tokens, decided from lengths alone.

An epoch is shuffled, cut into windows of at most `window` samples, and each window is packed by best fit in
descending order of length: every sample goes into the fullest row that still has room for it. Lengths are
ordered by buckets of T/64 tokens with the shuffle deciding inside a bucket, so that each epoch makes
different rows; in measurements this costs no row against exact ordering. Samples shorter than T/8 form one
bucket: they fill gaps well in any order, and ordered by length they would make rows of one length, which on
mixed data means rows of one task. A sample is never split over rows.

Every random choice comes from raw PCG64 output, whose stream numpy guarantees across versions, so that a plan
is a function of (lengths, T, window, seed, epoch) and of nothing else.

Source: best-fit packing as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullweight.core.errors import DataError

Indices = NDArray[np.int64]

_BUCKETS_PER_ROW = 64
_SMALL = 8  # samples below a row's eighth are left in shuffled order
_ORDER_TAG, _SOURCE_TAG = 0, 1


@dataclass(frozen=True)
class Plan:
    """Rows of an epoch: row i holds the samples `samples[offsets[i]:offsets[i + 1]]`, in that order."""

    samples: Indices  # [number of samples]
    offsets: Indices  # [num_rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Indices:
        """Indices of the samples of one row."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]]


def best_fit(lengths: NDArray[Any], row_tokens: int) -> Plan:
    """Pack samples in the order given, each into the fullest row with room, else into a new one.

    Deterministic: among equally full rows the newest is taken. Raises DataError on a length below 1 or above
    `row_tokens`. O(n log T).
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_tokens):
        raise DataError(
            f"lengths of {lengths.min()} to {lengths.max()} tokens do not pack into rows of {row_tokens}"
        )
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces, ascending
    rows_with: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths.tolist()):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, free = len(rows), row_tokens
            rows.append([])
        else:
            free = spaces[at]
            row = rows_with[free].pop()
            if not rows_with[free]:
                del rows_with[free], spaces[at]
        rows[row].append(sample)
        if left := free - length:
            if left not in rows_with:
                insort(spaces, left)
                rows_with[left] = []
            rows_with[left].append(row)
    sizes = np.array([0, *map(len, rows)], dtype=np.int64)
    samples = np.array([s for row in rows for s in row], dtype=np.int64)
    return Plan(samples, np.cumsum(sizes))


def plan_rows(lengths: NDArray[Any], row_tokens: int) -> Plan:
    """The tightest plan, longest sample first and ties in order: for held-out data, which has no epochs."""
    order = np.argsort(-lengths, kind="stable")
    plan = best_fit(lengths[order], row_tokens)
    return Plan(order[plan.samples], plan.offsets)


def plan_epoch(
    lengths: NDArray[Any], samples: Indices, *, row_tokens: int, window: int, seed: int, epoch: int
) -> Plan:
    """Rows of one epoch over `samples` (indices into `lengths`, repeats allowed), in training order.

    Samples meet only within a window of `window` samples of the epoch's shuffled order; the rows of a window
    are shuffled among themselves.
    """
    shuffled = samples[permutation(len(samples), seed, _ORDER_TAG, epoch)]
    bucket = max(1, row_tokens // _BUCKETS_PER_ROW)
    parts: list[Indices] = []
    for number, start in enumerate(range(0, len(shuffled), window)):
        chunk = shuffled[start : start + window]
        size = np.maximum(lengths[chunk] // bucket, _BUCKETS_PER_ROW // _SMALL)
        chunk = chunk[np.argsort(-size, kind="stable")]
        plan = best_fit(lengths[chunk], row_tokens)
        order = permutation(plan.num_rows, seed, _ORDER_TAG, epoch, number)
        parts += [chunk[plan.row(i)] for i in order.tolist()]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Plan(np.concatenate(parts) if parts else samples[:0], offsets)


def epoch_samples(groups: Sequence[Indices], weights: Sequence[float] | None, seed: int, epoch: int) -> Indices:
    """Which samples (indices, repeats possible) an epoch has, given the samples of each source.

    Without weights: every sample once. With weights an epoch has as many samples as all sources together, N,
    and source s gives N * weight_s / sum(weights) of them, rounded by largest remainder (ties to the earlier
    source). Each source is dealt like a deck of cards: its samples are seen in a shuffled order, reshuffled
    only when all were seen, and an epoch goes on where the one before stopped. So no sample of a source is
    seen k + 1 times before every one was seen k times.
    """
    if weights is None:
        return np.concatenate(groups)
    shares = np.array(weights, dtype=np.float64) * sum(map(len, groups)) / math.fsum(weights)
    counts = np.floor(shares).astype(np.int64)
    short = sum(map(len, groups)) - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:short]] += 1
    chosen = [
        _deal(group, int(count), seed, number, epoch)
        for number, (group, count) in enumerate(zip(groups, counts, strict=True))
    ]
    return np.concatenate(chosen)


def permutation(count: int, *key: int) -> Indices:
    """A permutation of range(count) that depends on the key alone (non-negative integers)."""
    # The length prevents keys that differ by trailing zeros from meeting: SeedSequence pads with zeros.
    bits = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(count)
    return np.argsort(bits, kind="stable")


def _deal(group: Indices, count: int, seed: int, source: int, epoch: int) -> Indices:
    size = len(group)
    begin, end = epoch * count, (epoch + 1) * count
    parts = [group[:0]]
    for deck in range(begin // size, -(-end // size)):
        order = permutation(size, seed, _SOURCE_TAG, source, deck)
        parts.append(group[order[max(begin - deck * size, 0) : end - deck * size]])
    return np.concatenate(parts)
