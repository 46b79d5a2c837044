"""The sizes that depend on values, read from tensors in one place.

How far a chunk's entries reach and how many rows an expert has decide the shapes of products. A rehearsal, whose
tensors have no values, answers these questions itself: inside `replaced(sizes)` its answers are taken, and no
kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fullweight.core.types import CompressionTable
from fullweight.ops import native


class Sizes:
    """The answers of tensors with values."""

    index_products: int = 1 << 21  # of the indexer's queries and keys that exist at the same time
    tile: int = 512  # rows of an expert that share one product

    def entries(self, table: CompressionTable, a: int, b: int) -> tuple[int, int]:
        """Bounds of the entries that any of the tokens [a, b) sees; `b` may lie beyond the row."""
        last = min(b, table.entry_begin.shape[0]) - 1
        return int(table.entry_begin[a]), int(table.entry_end[last])

    def rows(self, counts: Tensor, choices: int) -> list[int]:
        """Rows of each expert, of counts [X] int64 that `choices` were rounded up to."""
        return counts.tolist()


_current = Sizes()


def sizes() -> Sizes:
    """Who answers now."""
    return _current


@contextmanager
def replaced(answers: Sizes) -> Iterator[None]:
    """Take `answers`, and run no kernel."""
    global _current  # noqa: PLW0603
    before, _current = _current, answers
    try:
        with native.silent():
            yield
    finally:
        _current = before
