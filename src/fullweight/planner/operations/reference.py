"""What sets for accelerators leave to `ops/reference.py`: compression, and the weights of the streams by Sinkhorn.

Plain torch, whose autograd keeps what its formulas need. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.planner.graph import Value
from fullweight.planner.operations.base import FP32, Back
from fullweight.planner.operations.cpu import Operations
from fullweight.planner.tape import Block


class Reference(Operations):
    """The reference's; a device's own come on top."""

    @classmethod
    def kept_more(cls, config: DeepSeekV4Config, kind: LayerKind, row_tokens: int) -> int:
        """Rounds of Sinkhorn, of both sublayers."""
        n = config.hc_mult
        return 2 * (2 * config.hc_sinkhorn_iters - 1) * (n * n + n) * FP32

    def compress(
        self, name: str, values: Value, gates: Value, rows: int, entries: int, width: int, c: int, ratio: int
    ) -> Value:
        """Windows gathered by index; values and shares are kept."""
        cells = entries * ratio * width * FP32
        value, picked = self.new(cells), self.new(cells)
        gate = self.new(cells)
        del picked
        if width > c:  # halves of the window before and of this one
            picked = self.new(cells)
            before = self.new(cells // 2), self.new(cells // 2)
            del picked
            picked = self.new(cells)
            earlier = self.new(cells // 2)
            del picked
            value = self.new(cells)
            del earlier
            gate = self.new(cells)
            del before
        share, product = self.new(cells), self.new(cells)
        out = self.new(entries * c * FP32)
        del gate, product

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dvalue, dshare = self.new(cells), self.new(cells)
            dgate = self.new(cells)
            del dshare
            parts = [self.new(cells) for _ in range(2 if width > c else 0)]
            size = rows * width * FP32
            zeros, dvalues = self.new(size), self.new(size)
            dgates = self.new(size)
            del zeros, parts, dvalue, dgate
            self.weigh(f"{name}.ape", self.new(ratio * width * FP32))
            return dvalues, dgates

        return self.graph.node(backward, [values, gates], [out], [value, share])[0]

    def stream_weights(self, logits: Value, tokens: int, n: int, rounds: int) -> list[Value]:
        """(pre, post, comb) of a sublayer's streams, from the maps' logits."""
        maps, square = (2 + n) * n, tokens * n * n * FP32
        made = [self.new(tokens * n * FP32), self.new(tokens * n * FP32), self.new(square)]
        shares = self.new(2 * tokens * n * FP32)
        # Sinkhorn's sums and quotients but the last, which is the result
        every = self.new((2 * rounds - 1) * (square + tokens * n * FP32) + square)
        back = lambda g, s: (self.new(tokens * maps * FP32),)  # noqa: E731
        return self.graph.node(back, [logits], made, [shares, every, made[2]])

    def head_weights(self, logits: Value, tokens: int, n: int) -> Value:
        """Of the streams that the head reads."""
        share = self.new(tokens * n * FP32)
        back = lambda g, s: (self.new(tokens * n * FP32),)  # noqa: E731
        return self.graph.node(back, [logits], [self.new(tokens * n * FP32)], [share])[0]
