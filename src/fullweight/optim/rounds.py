"""Which rank owns which cut matrix, in rounds of bounded size. Imports no torch: the planner deals as Muon."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TypeVar

Shape = tuple[int, int]
M = TypeVar("M")


def multiply_adds(shape: Shape) -> int:
    """Of one Newton-Schulz step: two products with the matrix and one of its square."""
    small, large = min(shape), max(shape)
    return 2 * small * small * large + small**3


def rounds(
    matrices: Iterable[M], num_ranks: int, shape_of: Callable[[M], Shape], most_entries: int
) -> Iterator[list[list[M]]]:
    """In each round, the matrices of every rank: at most `most_entries` entries or one matrix.

    The dearest matrix goes first, each to the rank with the least to do. Depends only on the shapes and their
    order, so all ranks agree.
    """
    queues: list[list[M]] = [[] for _ in range(num_ranks)]
    least = [(0, rank) for rank in range(num_ranks)]
    for matrix in sorted(matrices, key=lambda m: (-multiply_adds(shape_of(m)), shape_of(m))):
        cost, owner = least[0]
        heapq.heapreplace(least, (cost + multiply_adds(shape_of(matrix)), owner))
        queues[owner].append(matrix)
    while any(queues):
        yield [_take(queue, shape_of, most_entries) for queue in queues]


def _take(queue: list[M], shape_of: Callable[[M], Shape], most_entries: int) -> list[M]:
    """Remove from the front what fits one round."""
    taken, entries = 0, 0
    for matrix in queue:
        entries += prod(shape_of(matrix))
        if taken and entries > most_entries:
            break
        taken += 1
    batch = queue[:taken]
    del queue[:taken]
    return batch
