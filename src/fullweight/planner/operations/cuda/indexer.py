"""The indexer of an NVIDIA GPU: the reference's choice, and a loss over all entries. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back
from fullweight.planner.operations.cuda.attention import MOST_SCORES
from fullweight.planner.operations.reference import QUERIES, Reference
from fullweight.planner.tape import Block


class CudaIndexer(Reference):
    """Which entries attention reads, and what they should have been."""

    def select_entries(self, tokens: int, heads: int, num_entries: int, topk: int, c: int, ratio: int) -> Value:
        """A chunk of queries at a time, whose scores are sorted."""
        out = self.new(tokens * topk * INT64)
        found: tuple[Block, ...] = ()
        for start in range(0, tokens, QUERIES)[:2]:  # more of them do the same
            chunk = min(QUERIES, tokens - start)
            scores = self._index_scores(chunk, heads, num_entries)[-1]
            hidden = self.new(chunk * num_entries)
            masked = self.new(chunk * num_entries * FP32)
            found = scores, hidden, self.new(chunk * num_entries * FP32), self.new(chunk * num_entries * INT64)
            del masked, scores, hidden
        del found
        return Value(out)

    def _index_scores(self, chunk: int, heads: int, entries: int) -> tuple[Block, Block, Block]:
        """Products of a chunk behind their threshold, these in fp32, and the scores, their sum over heads."""
        size = chunk * heads * entries
        products, positive = self.new(size * BF16), self.new(size * BF16)
        wide = self.new(size * FP32)
        summed = self.new(chunk * entries * FP32)
        del products
        return positive, wide, summed

    def indexer_loss(
        self,
        queries: Value,
        keys: Value,
        weights: Value,
        selected: Value,
        mass: Value,
        *,
        tokens: int,
        heads: int,
        c: int,
        entries: int,
        topk: int,
    ) -> Value:
        """A chunk of queries at a time, made again in backward; targets and masks of all entries are kept."""
        numbers = tokens * heads * c * BF16
        step = max(1, MOST_SCORES // max(1, heads * entries))
        sizes = [min(step, tokens - start) for start in range(0, tokens, step)]
        shown, others = sizes[-3:], sum(sizes[:-3])  # more of them do the same
        targets = [self.new(others * (entries + 1) * (FP32 + 1))]

        def forward(chunk: int) -> tuple[Block, ...]:
            """What backward needs of a chunk."""
            positive, wide, scores = self._index_scores(chunk, heads, entries)
            return positive, wide, *[self.new(chunk * entries * FP32) for _ in range(5)], scores

        chosen = None
        for chunk in shown:
            chosen = self.new(chunk * topk * INT64)
            target, seen = self.new(chunk * (entries + 1) * FP32), self.new(chunk * (entries + 1))
            targets += [target, seen]
            del target, seen
            forward(chunk)
        del chosen
        loss = self.new(4)

        def backward(gradients: Sequence[Block], saved: Sequence[Block | list[Block]]) -> Back:
            dqueries = dkeys = dweights = None
            for chunk in reversed(shown):
                size = chunk * heads * entries
                positive, wide, *rest = forward(chunk)
                of_chunks = saved[3]
                assert isinstance(of_chunks, list)
                del of_chunks[-2:]
                dscores = self.new(chunk * entries * FP32)
                del rest
                dwide = self.new(size * FP32)
                del wide, dscores
                narrow = self.new(size * BF16)
                del dwide
                dproducts = self.new(size * BF16)
                del narrow, positive
                part, spread = self.new(chunk * heads * c * BF16), self.new(entries * c * BF16)
                del dproducts
                dkeys = spread if dkeys is None else self.new(entries * c * BF16)
                spread = self.new(tokens * heads * FP32)
                dweights = spread if dweights is None else self.new(tokens * heads * FP32)
                spread = self.new(numbers)
                del part
                dqueries = spread if dqueries is None else self.new(numbers)
                del spread
            return dqueries, dkeys, dweights

        return self.graph.node(backward, [queries, keys, weights], [loss], [queries, keys, weights, targets])[0]
