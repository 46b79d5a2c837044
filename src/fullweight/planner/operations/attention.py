"""Attention, compression and the indexer of a CPU (`ops/cpu/attention.py`, `compressor.py`, `indexer.py`).

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64, Back, Base, up
from fullweight.planner.tape import Block

BLOCK, CHUNK, SCORES = 32, 256, 1 << 20  # of ops/cpu/attention.py
_PRODUCTS = 1 << 24  # index products at once in a rehearsal


class Attention(Base):
    """Keys of a window and compressed entries, in chunks of queries."""

    def compress(
        self, name: str, values: Value, gates: Value, rows: int, entries: int, width: int, c: int, ratio: int
    ) -> Value:
        """Windows of `ratio` of [rows, width] fp32 pooled to [entries, c] fp32."""
        out = self.new(entries * c * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given = self.new(rows * width * FP32), self.new(rows * width * FP32)
            self.weigh(f"{name}.ape", self.new(ratio * width * FP32))
            return given

        return self.graph.node(backward, [values, gates], [out], [values, gates])[0]

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
        """(out, mass): queries [tokens, heads, c] over keys [front + tokens, c] and entries [num_entries, c].

        `topk` entries are chosen for each token, or all are read in order when it is 0.
        """
        before, width = up(window, BLOCK), up(window, BLOCK) + BLOCK
        chosen = topk if selected is not None else 0
        chunk = min(max(CHUNK, SCORES // (heads * (width + chosen)) // BLOCK * BLOCK), tokens)
        reach = chosen or min(up(num_entries, 64 if num_entries > 256 else 16), num_entries)
        queries = tokens * heads * c * BF16

        has_entries = entries is not None

        def pad() -> Block | None:
            return self.new((before + tokens) * c * BF16) if before != front else None

        ranges, padded = self.new(tokens * 4 * INT32), pad()
        out, lse = self.new(queries), self.new(tokens * heads * FP32)
        mass = self.new(tokens * chosen * FP32)

        sizes = tuple(min(chunk, tokens - start) for start in range(0, tokens, chunk)[:2])  # more do the same

        def chunks() -> Iterator[tuple[int, int, tuple[Block, ...]]]:
            for size in sizes:
                keys = self.new(size // BLOCK * width * c * BF16)
                picked = self.new(size * chosen * c * BF16) if chosen else None
                yield size, size * heads, (keys, picked) if picked is not None else (keys,)

        def scores(rows: int, entry: bool) -> Block:
            return self.new(rows * (reach if entry else width) * BF16)

        turn = in_window = weighted = None
        for turn in chunks():
            rows = turn[1]
            in_window = scores(rows, False), scores(rows, True) if has_entries else None
            weighted = self.new(rows * c * BF16)
        del ranges, padded, turn, in_window, weighted

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            ranges, padded = self.new(tokens * 4 * INT32), pad()
            delta = self.new(tokens * heads * FP32)
            turned = self.new(queries)
            dq = self.new(queries)
            dkv = self.new((before + tokens) * c * FP32)
            dentries = self.new(num_entries * c * FP32) if has_entries else None
            turn = in_window = in_entries = None
            for turn in chunks():
                size, rows = turn[:2]
                in_window = scores(rows, False), scores(rows, False)
                self.new(size // BLOCK * width * c * BF16)
                if has_entries:
                    in_entries = scores(rows, True), scores(rows, True)
                    self.new((size * chosen if chosen else reach) * c * BF16)
                self.new(rows * c * BF16)
            dsink = self.new(tokens * heads * FP32), self.new(tokens * heads * FP32)
            del dsink
            keys = self.new((front + tokens) * c * BF16)
            made = self.new(num_entries * c * BF16) if dentries is not None else None
            del ranges, padded, delta, turned, dkv, dentries, turn, in_window, in_entries
            return dq, keys, made, None

        kept = [q, keys, entries, selected, out, lse]
        found = self.graph.node(backward, [q, keys, entries, None], [out], kept)
        return found[0], Value(mass)

    def select_entries(self, tokens: int, heads: int, num_entries: int, topk: int, c: int, ratio: int) -> Value:
        """The indices; nothing flows back. Products exist for a few queries at a time."""
        out = self.new(tokens * topk * INT64)
        size = max(BLOCK, min(CHUNK, _PRODUCTS // (heads * max(num_entries, 1))) // BLOCK * BLOCK)
        products = None
        for start in range(0, tokens, size)[:2]:
            products = self.new(min(size, tokens - start) * heads * num_entries * BF16)
        del products
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
        """Its gradients are formed in forward and kept in place of everything else."""
        dqueries, dkeys = self.new(tokens * heads * c * BF16), self.new(entries * c * FP32)
        dweights = self.new(tokens * heads * FP32)
        picked = products = None
        for start in range(0, tokens, CHUNK)[:2]:
            chunk = min(CHUNK, tokens - start)
            picked = self.new(chunk * topk * c * BF16)
            products = self.new(chunk * heads * topk * BF16)
            self.new(chunk * heads * c * BF16)
            self.new(chunk * topk * c * BF16)
        del picked, products
        loss = self.new(4)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            wide = self.new(entries * c * FP32)
            keys = self.new(entries * c * BF16)
            del wide
            weights = self.new(tokens * heads * FP32)
            return self.new(tokens * heads * c * BF16), keys, weights

        return self.graph.node(backward, [queries, keys, weights], [loss], [dqueries, dkeys, dweights])[0]
