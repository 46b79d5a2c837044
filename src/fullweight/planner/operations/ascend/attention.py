"""Attention of an Ascend die. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64, Back, up
from fullweight.planner.operations.reference import QUERIES, Reference
from fullweight.planner.tape import Block

PLACES, ROTARY = 1024, 64  # STEP and ROTARY_DIM of ops/ascend/attention.py


class AscendAttention(Reference):
    """One call over lists of the keys that each query sees."""

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
        """One call over lists of the keys that each query sees; tokens' keys and entries stand in one tensor."""
        queries, statistic = tokens * heads * c * BF16, tokens * heads * FP32
        total = front + tokens + num_entries
        if entries is not None:
            keys = self.graph.node(lambda g, s: (g[0], g[0]), [keys, entries], [self.new(total * c * BF16)])[0]
        most = topk if selected is not None else num_entries
        places, chosen = up(window + most, PLACES), selected is not None

        def around() -> tuple[Block, ...]:
            index = self._list(tokens, places, most, chosen=chosen)
            return index, self.new(tokens * heads * ROTARY * BF16), self.new(total * ROTARY * BF16)

        given = around()
        raw, largest, denominator = self.new(queries), self.new(statistic), self.new(statistic)
        del given
        highest, part = self.new(statistic), self.new(statistic)
        summed = self.new(statistic)
        del largest, denominator
        wide = self.new(2 * queries)
        out = self.new(queries)
        del wide, raw, part
        logarithm = self.new(statistic)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given = around()
            dq, parts = self.new(queries), (self.new(total * c * BF16), self.new(total * c * BF16))
            extra = self.new(tokens * heads * ROTARY * BF16)
            del given, extra
            share = self.new(statistic), self.new(statistic)
            wide = self.new(2 * queries), self.new(2 * queries)
            product = self.new(2 * queries)
            del wide
            summed = self.new(statistic)
            del product, summed, share
            dkeys = self.new(total * c * BF16)
            del parts
            return dq, dkeys

        kept: list[Value | Block | None] = [q, keys, out, highest, summed, selected]
        found = self.graph.node(backward, [q, keys], [out], kept)[0]
        mass = self._mass(tokens, heads, topk, c) if selected is not None else self.new(0)
        del logarithm, out, highest, summed
        return self.rotary(found, tokens * heads, c, turned), Value(mass)

    def _list(self, tokens: int, places: int, most: int, *, chosen: bool) -> Block:
        """Which row stands at each place of each query's list."""
        size = tokens * places * INT32
        place = self.new(size)
        entry: tuple[Block, ...] = ()
        if chosen:
            inside = self.new(size)
            cast = self.new(tokens * most * INT32), self.new(tokens * places * INT64)
            entry = inside, self.new(size)
            del cast, inside
        elif most:
            entry = (self.new(size),)
        if most:
            seen = [self.new(tokens * places) for _ in range(3)][1:]
            moved = self.new(size)
            rest = self.new(size)
            del seen, moved
        else:
            rest = self.new(size)
        del place, entry
        short, first = self.new(tokens * places), self.new(size)
        out = self.new(size)
        del short, first, rest
        return out

    def _mass(self, tokens: int, heads: int, topk: int, c: int) -> Block:
        """Probabilities of chosen entries, summed over heads: what the operator keeps to itself."""
        parts = self.new(tokens * topk * FP32)
        keys = scores = None
        for start in range(0, tokens, QUERIES)[:2]:  # more of them do the same
            chunk = min(QUERIES, tokens - start)
            keys = self.new(chunk * topk * c * BF16)
            narrow = self.new(chunk * heads * topk * BF16)
            wide = self.new(chunk * heads * topk * FP32)
            del narrow
            scores = self.new(chunk * heads * topk * FP32)
            del wide
            apart = self.new(chunk * heads * topk * FP32)
            share = self.new(chunk * heads * topk * FP32)
            del apart, share
        del keys, scores
        made = self.new(tokens * topk * FP32)
        del parts
        return made
