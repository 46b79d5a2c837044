"""What a traced step held in memory, moment by moment and by category: births and deaths of blocks, added up.

A block is one storage. What it was for is known only when it is gone: a tensor made in forward that lives into
backward is an activation, one that does not is temporary. So the tracer writes down births, deaths and marks, and
the categories are settled here, once, over the whole record.

Moments are counted in operations. Sizes are what torch asks an allocator for; an allocator's rounding and its
cached free blocks come on top and are not here. Left out: memory that a library takes for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np


class Category(StrEnum):
    """What memory is for; the order is that of the reports."""

    parameters = "parameters"  # this rank's part of the fp32 weights, and buffers
    optimizer = "optimizer"  # moments, counters
    gradients = "gradients"  # this rank's part, after reduction
    gathered = "gathered"  # whole weights and whole gradients of sharded parameters, while in use
    activations = "activations"  # made in forward, alive when a backward pass begins
    communication = "communication"  # other buffers that a collective reads or writes
    temporaries = "temporaries"


CATEGORIES = tuple(Category)


@dataclass
class Block:
    """One storage of `num_bytes`; moments are operation counts, `death` None while it lives."""

    num_bytes: int
    birth: int
    module: str
    in_backward: bool
    mark: Category | None = None  # what somebody said it is
    in_collective: bool = False
    death: int | None = None


@dataclass(frozen=True)
class Timeline:
    """bytes by category [categories, moments], at the moments where any of them changed."""

    moments: np.ndarray
    by_category: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.by_category.sum(0)

    def peak_index(self) -> int:
        """Where the total was largest, first."""
        return int(self.total.argmax())

    def at(self, index: int) -> dict[str, int]:
        """Bytes by category at one of the moments."""
        return {str(c): int(v) for c, v in zip(CATEGORIES, self.by_category[:, index], strict=True)}

    def most(self) -> dict[str, int]:
        """Largest bytes of each category, each at its own moment."""
        return {str(c): int(v) for c, v in zip(CATEGORIES, self.by_category.max(1), strict=True)}

    def thinned(self, points: int) -> Timeline:
        """At most about `points` moments, the largest total of each stretch among them."""
        count = len(self.moments)
        if count <= points:
            return self
        edges = np.linspace(0, count, points + 1).astype(int)
        total = self.total
        kept = np.array([a + int(total[a:b].argmax()) for a, b in pairwise(edges) if b > a])
        return Timeline(self.moments[kept], self.by_category[:, kept])


def category(block: Block, backward_begins: np.ndarray) -> Category:
    """What a block turned out to be; backward passes began at the moments `backward_begins`, ascending."""
    if block.mark is not None:
        return block.mark
    if not block.in_backward:
        following = int(np.searchsorted(backward_begins, block.birth, side="right"))
        lives_on = following < len(backward_begins) and (
            block.death is None or block.death > backward_begins[following]
        )
        if lives_on:
            return Category.activations
    return Category.communication if block.in_collective else Category.temporaries


def timeline(blocks: Sequence[Block], backward_begins: Sequence[int], last: int) -> Timeline:
    """Bytes by category over all blocks; `last` is the count of operations at the end."""
    begins = np.asarray(backward_begins, dtype=np.int64)
    index = {c: i for i, c in enumerate(CATEGORIES)}
    rows = np.array([index[category(b, begins)] for b in blocks], dtype=np.int64)
    sizes = np.array([b.num_bytes for b in blocks], dtype=np.int64)
    births = np.array([b.birth for b in blocks], dtype=np.int64)
    deaths = np.array([last + 1 if b.death is None else b.death for b in blocks], dtype=np.int64)
    # A block that dies at a moment is gone before the next operation's results exist.
    moments = np.unique(np.concatenate((births, deaths[deaths <= last])))
    changes = np.zeros((len(CATEGORIES), len(moments)), dtype=np.int64)
    np.add.at(changes, (rows, np.searchsorted(moments, births)), sizes)
    gone = deaths <= last
    np.add.at(changes, (rows[gone], np.searchsorted(moments, deaths[gone])), -sizes[gone])
    return Timeline(moments, changes.cumsum(1))
