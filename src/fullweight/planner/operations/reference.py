"""What sets for accelerators leave to `ops/reference.py`: compression and hyper-connections.

Plain torch, whose autograd keeps what its formulas need. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, Back
from fullweight.planner.operations.cpu import Operations
from fullweight.planner.tape import Block

QUERIES, LOGITS = 256, 1024  # QUERY_CHUNK and TOKEN_CHUNK of ops/reference.py


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

    # ---- hyper-connections --------------------------------------------------------------------------

    def hyper_pre(
        self, name: str, streams: Value, tokens: int, n: int, d: int, rounds: int
    ) -> tuple[Value, Value, Value]:
        logits = self._hyper_logits(f"{name}_fn", streams, tokens, n * d, (2 + n) * n)
        weights = self.stream_weights(logits, tokens, n, rounds)
        del logits
        x = self._mixed(streams, weights[0], tokens, n, d)
        self.graph.keep(x, lambda *_: self._sum(tokens, n, d), streams, Value(weights[0].block))
        return x, weights[1], weights[2]

    def _hyper_logits(self, name: str, streams: Value, tokens: int, width: int, maps: int) -> Value:
        """The maps' logits: a product in fp32, over the root of the streams' mean square."""
        numbers = tokens * width
        flat = self._wide(streams, numbers)

        def back_product(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given, weight = self.new(numbers * FP32), self.new(maps * width * FP32)
            self.weigh(name, self.new(maps * width * FP32))  # a copy that lies as the weight does
            del weight
            return (given,)

        def back_square(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            power, twice = self.new(numbers * FP32), self.new(numbers * FP32)
            made = self.new(numbers * FP32)
            del power, twice
            return (made,)

        product = self.graph.node(back_product, [flat], [self.new(tokens * maps * FP32)], [flat])[0]
        square = self.graph.node(back_square, [flat], [self.new(numbers * FP32)], [flat])[0]
        root = self.new(tokens * FP32)
        inverse = self.graph.node(lambda g, s: (self.new(numbers * FP32),), [square], [root], [root])[0]
        del square
        scaled = lambda g, s: (self.new(tokens * maps * FP32), self.new(tokens * FP32))  # noqa: E731
        out = self.new(tokens * maps * FP32)
        return self.graph.node(scaled, [product, inverse], [out], [product, inverse])[0]

    def _mixed(self, streams: Value, pre: Value, tokens: int, n: int, d: int) -> Value:
        """The streams' weighted sum."""
        wide = self._wide(streams, tokens * n * d)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            return self.new(tokens * n * d * FP32), self.new(tokens * n * FP32)

        mixed = self.graph.node(backward, [wide, pre], [self.new(tokens * d * FP32)], [wide, pre])[0]
        return self._narrow(mixed, tokens * d)

    def _sum(self, tokens: int, n: int, d: int) -> Block:
        """The same, made again."""
        wide, mixed = self.new(tokens * n * d * FP32), self.new(tokens * d * FP32)
        del wide
        out = self.new(tokens * d * BF16)
        del mixed
        return out

    def hyper_post(self, streams: Value, y: Value, post: Value, comb: Value, tokens: int, n: int, d: int) -> Value:
        numbers = tokens * n * d
        wide = self._wide(streams, numbers)

        def back_mix(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            return self.new(tokens * n * n * FP32), self.new(numbers * FP32)

        def back_product(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            of_y, of_post = self.new(numbers * FP32), self.new(numbers * FP32)
            dpost = self.new(tokens * n * FP32)
            del of_post
            dy = self.new(tokens * d * FP32)
            del of_y
            return dpost, dy

        mixed = self.graph.node(back_mix, [comb, wide], [self.new(numbers * FP32)], [comb, wide])[0]
        wide_y = self._wide(y, tokens * d)
        product = self.graph.node(back_product, [post, wide_y], [self.new(numbers * FP32)], [post, wide_y])[0]
        total = self.graph.node(lambda g, s: (g[0], g[0]), [mixed, product], [self.new(numbers * FP32)])[0]
        del product
        return self._narrow(total, numbers)

    def again_post(self, tokens: int, n: int, d: int) -> Callable[..., Block]:
        def again(*_: Block) -> Block:
            numbers = tokens * n * d
            wide, mixed = self.new(numbers * FP32), self.new(numbers * FP32)
            del wide
            wide_y, product = self.new(tokens * d * FP32), self.new(numbers * FP32)
            del wide_y
            total = self.new(numbers * FP32)
            del product
            out = self.new(numbers * BF16)
            del total, mixed
            return out

        return again

    def hyper_head(self, name: str, streams: Value, tokens: int, n: int, d: int) -> Value:
        logits = self._hyper_logits(f"{name}_fn", streams, tokens, n * d, n)
        return self._mixed(streams, self.head_weights(logits, tokens, n), tokens, n, d)

    def _wide(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * BF16),), [x], [self.new(numbers * FP32)])[0]

    def _narrow(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * FP32),), [x], [self.new(numbers * BF16)])[0]
