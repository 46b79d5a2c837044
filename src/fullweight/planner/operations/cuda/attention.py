"""Attention of an NVIDIA GPU: dense products over blocks of queries (`ops/dense.py`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back, up
from fullweight.planner.operations.cuda.elementwise import CudaElementwise
from fullweight.planner.tape import Block

BLOCK, MOST_SCORES = 128, 1 << 26  # of ops/dense.py


@dataclass(frozen=True)
class Part:
    """Some blocks of queries: `rows` by head, keys of all their spans, scores of tokens and of entries, in
    numbers; what is `seen` of tokens and entries, which heads share."""

    queries: int
    rows: int
    keys: int
    near: int
    far: int
    seen: tuple[int, int]
    is_filled: bool  # with queries that are not there


def parts_of(tokens: int, heads: int, size: int, window: int, entries: int) -> list[Part]:
    """The first two: more of them do the same."""
    span, blocks = size + window - 1, -(-tokens // size)
    step = max(1, MOST_SCORES // (size * heads * (span + entries)))
    found = []
    for first in range(0, blocks, step)[:2]:
        count = min(step, blocks - first)
        queries = count * size
        rows = queries * heads
        seen = queries * span, queries * entries
        filled = first * size + queries > tokens
        found.append(Part(queries, rows, count * span, rows * span, rows * entries, seen, filled))
    return found


class CudaAttention(CudaElementwise):
    """Scores of a part of the queries, in fp32, over whole spans of tokens and all entries."""

    def attention(
        self,
        q: Value,
        keys: Value,
        entries: Value | None,
        selected: Value | None,
        *,
        tokens: int,
        front: int,
        heads: int,
        c: int,
        window: int,
        num_entries: int,
        topk: int,
        turned: int,
    ) -> tuple[Value, Value]:
        """Keeps its inputs and the statistic; the output is rotated back, which keeps a table alone."""
        size, places = max(BLOCK, window), topk if selected is not None else 0
        queries, statistic = tokens * heads * c * BF16, tokens * heads * FP32
        padded = (up(tokens, size) + window - 1) * c * BF16
        parts = parts_of(tokens, heads, size, window, num_entries)
        has_entries = entries is not None  # backward must not hold them
        out, lse, mass = self.new(queries), self.new(statistic), self.new(tokens * places * FP32)
        spans, near, far, mixed, summed = self.new(padded), None, None, None, None
        for part in parts:
            filled = self.new(part.rows * c * BF16 if part.is_filled else 0)
            near, far = self._seen_scores(part, places)
            for numbers in part.near, part.far:
                difference = self.new(numbers * FP32)
                self.new(numbers * FP32)
                del difference
            near, far = self.new(part.near * FP32), self.new(part.far * FP32)
            mixed = self._values(part, c, wide=True)
            if places:
                summed = self.new(part.queries * num_entries * FP32)
                self.new(part.queries * places * INT64)
            del filled
        del spans, near, far, mixed, summed

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            unused = self.new(statistic), self.new(tokens * places * FP32)  # gradients of the other two results
            dq, dkeys = self.new(queries), self.new((up(tokens, size) + size) * c * FP32)
            dentries, spans = self.new(num_entries * c * FP32), self.new(padded)
            self._parts_back(parts, num_entries, places, c)
            del spans
            given = self.new((front + tokens) * c * BF16)
            of_entries = self.new(num_entries * c * BF16)
            del unused, dkeys, dentries
            return dq, given, of_entries if has_entries else None, None

        found = self.graph.node(backward, [q, keys, entries, None], [out], [q, keys, entries, selected, lse])
        del out, lse
        sine = self.new(tokens * turned // 2 * FP32)
        back = lambda g, s: (self.turned(tokens * heads, c, turned, BF16),)  # noqa: E731
        made = self.turned(tokens * heads, c, turned, BF16)
        return self.graph.node(back, found, [made], [sine])[0], Value(mass)

    def _parts_back(self, parts: Sequence[Part], entries: int, places: int, c: int) -> None:
        """What a part leaves is there until the next one's takes its place, as a loop's names have it."""
        near = far = dnear = dfar = mixed = dspan = None
        for part in parts:
            filled = self.new(2 * part.rows * c * BF16 if part.is_filled else 0)
            near, far = self._seen_scores(part, places)
            near, far = self.new(part.near * FP32), self.new(part.far * FP32)
            dnear, dfar = self._widened(part.near), self._widened(part.far)
            for numbers in part.near, part.far:
                self.new(numbers * FP32)
            dnear = self._of_scores(part.near)
            dfar = self._of_scores(part.far)
            mixed = self._values(part, c, wide=False)
            dspan = self._widened(part.keys * c)
            cast = self.new(part.near * BF16)
            self.new(part.keys * c * BF16)
            if part.far:
                cast = self.new(entries * c * BF16)
                cast = self.new(part.far * BF16)
                self.new(entries * c * BF16)
            del cast, filled
        del near, far, dnear, dfar, mixed, dspan

    def _seen_scores(self, part: Part, places: int) -> tuple[Block, Block]:
        """Scaled and masked, of tokens and of entries."""
        near = self._widened(part.near)
        mask = self._both(part.seen[0])
        other = self.new(part.seen[0])
        mask, other = self.new(part.seen[0]), mask
        other = self.new(part.seen[0])
        far = self._widened(part.far)
        if part.far:
            index = self.new(part.queries * places * INT64)
            other = self.new(part.seen[1]) if places else self._both(part.seen[1])
            del index
            other = self.new(part.seen[1])
            self.new(part.seen[1])
        del mask, other
        return near, far

    def _both(self, flags: int) -> Block:
        """One condition and another."""
        parts = self.new(flags), self.new(flags)
        made = self.new(flags)
        del parts
        return made

    def _widened(self, numbers: int) -> Block:
        """A product's result, in fp32."""
        narrow, made = self.new(numbers * BF16), self.new(numbers * FP32)
        del narrow
        return made

    def _of_scores(self, numbers: int) -> Block:
        """The gradient of scores, of that of probabilities."""
        difference = self.new(numbers * FP32)
        product = self.new(numbers * FP32)
        del difference
        scaled = self.new(numbers * FP32)
        del product
        made = self.new(numbers * BF16)
        del scaled
        return made

    def _values(self, part: Part, c: int, *, wide: bool) -> Block:
        """Keys and entries by their weights, which are cast where they are `wide`."""
        size = part.rows * c * BF16
        cast = self.new(part.near * BF16 if wide else 0)
        near = self.new(size)
        del cast
        cast = self.new(part.far * BF16 if wide else 0)
        far = self.new(size)
        del cast
        made = self.new(size)
        del near, far
        return made
