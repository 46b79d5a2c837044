"""The indexer of an Ascend die: its choice by the operator, its loss by the reference. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64, Back
from fullweight.planner.operations.cpu import Operations
from fullweight.planner.operations.reference import QUERIES
from fullweight.planner.tape import Block


class AscendIndexer(Operations):
    """Which entries attention reads, and what they should have been."""

    def select_entries(self, tokens: int, heads: int, num_entries: int, topk: int, c: int, ratio: int) -> Value:
        """The operator chooses for tokens that see more than `topk` entries; counted for a row's last slice."""
        chosen = tokens * topk * INT64
        entry, seen = self.new(chosen), self.new(tokens * topk)
        every = self.new(chosen)
        del seen
        choosing = max(min(tokens, ratio * (num_entries - topk - 1) + 1), 0)
        given = self.new(choosing * heads * c * BF16), self.new(choosing * heads * (BF16 + FP32))
        found = self.new(choosing * topk * INT32)
        del given
        moved = self.new(choosing * topk * INT64), self.new(choosing * topk * INT64)
        ordered = self.new(choosing * topk * INT64), self.new(choosing * topk * INT64)
        del moved
        spread = self.new(chosen)
        out = self.new(chosen)
        del entry, every, found, ordered, spread
        return Value(out)

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
        """The reference's: a chunk of queries at a time, made again in backward."""
        numbers = tokens * heads * c * BF16

        def shown() -> list[int]:
            return [min(QUERIES, tokens - start) for start in range(0, tokens, QUERIES)[:3]]  # the rest alike

        def forward(chunk: int) -> tuple[Block, ...]:
            picked, products = self.new(chunk * topk * c * BF16), self.new(chunk * heads * topk * BF16)
            positive, wide = self.new(chunk * heads * topk * BF16), self.new(chunk * heads * topk * FP32)
            del products
            return picked, positive, wide, *[self.new(chunk * topk * FP32) for _ in range(6)]

        for chunk in shown():
            forward(chunk)
        loss = self.new(4)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dqueries = dkeys = dweights = None
            for chunk in shown():
                held = forward(chunk)
                wide = self.new(chunk * heads * topk * FP32)
                narrow, threshold = self.new(chunk * heads * topk * BF16), self.new(chunk * heads * topk * BF16)
                held = held[:1]  # of the loss itself all has gone
                del wide, narrow
                dpicked, part = self.new(chunk * topk * c * BF16), self.new(chunk * heads * c * BF16)
                del threshold, held
                spread = self.new(entries * c * BF16)
                dkeys = spread if dkeys is None else self.new(entries * c * BF16)
                del spread, dpicked
                spread = self.new(tokens * heads * FP32)
                dweights = spread if dweights is None else self.new(tokens * heads * FP32)
                spread = self.new(numbers)
                del part
                dqueries = spread if dqueries is None else self.new(numbers)
                del spread
            return dqueries, dkeys, dweights

        kept = [queries, keys, weights, selected, mass]
        return self.graph.node(backward, [queries, keys, weights], [loss], kept)[0]
