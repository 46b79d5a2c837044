"""Norms, rotations, SwiGLU and hyper-connections of an Ascend die. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, Back
from fullweight.planner.operations.reference import Reference
from fullweight.planner.tape import Block


class AscendElementwise(Reference):
    """A rotation is an operation of its own; hyper-connections are plain torch."""

    def norm(
        self,
        name: str | None,
        x: Value,
        rows: int,
        width: int,
        size: int = BF16,
        keep: bool = True,
        turned: int = 0,
    ) -> Value:
        """A rotation is an operation of its own."""
        if not turned:
            return super().norm(name, x, rows, width, size, keep)
        normed = super().norm(name, x, rows, width, size, keep=False)
        value = self.rotary(normed, rows, width, turned, size)
        if keep:

            def again(_: Block) -> Block:
                normed, factors = self.new(rows * width * size), self.new(rows * FP32)
                made = self._rotated(rows, width, turned, size)
                del normed, factors
                return made

            self.graph.keep(value, again, x)
        return value

    def rotary(self, x: Value, rows: int, width: int, turned: int, size: int = BF16) -> Value:
        back = lambda g, s: (self._rotated(rows, width, turned, size),)  # noqa: E731
        return self.graph.node(back, [x], [self._rotated(rows, width, turned, size)])[0]

    def _rotated(self, rows: int, width: int, turned: int, size: int) -> Block:
        """The last channels in fp32, turned and put behind the others."""
        part = self.new(rows * turned * FP32 if size < FP32 else 0)
        other = self.new(rows * turned * FP32)
        narrow = self.new(rows * turned * size if size < FP32 else 0)
        out = self.new(rows * width * size)
        del part, other, narrow
        return out

    def swiglu(self, hidden: Value, rows: int, f: int) -> Value:
        back = lambda g, s: (self.swiglu_back(rows, f),)  # noqa: E731
        value = self.graph.node(back, [hidden], [self.new(rows * f * BF16)], [hidden])[0]
        return self.graph.keep(value, lambda _: self.new(rows * f * BF16), hidden)

    def swiglu_back(self, rows: int, f: int) -> Block:
        """The gradient at the clamped input, 0 where it clamps."""
        halves = self.new(rows * f * BF16), self.new(rows * f * BF16)
        clamped = self.new(rows * 2 * f * BF16)
        del halves
        inner, differs = self.new(rows * 2 * f * BF16), self.new(rows * 2 * f)
        made = self.new(rows * 2 * f * BF16)
        del clamped, inner, differs
        return made

    def _wide(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * BF16),), [x], [self.new(numbers * FP32)])[0]

    def _narrow(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * FP32),), [x], [self.new(numbers * BF16)])[0]

    # ---- hyper-connections --------------------------------------------------------------------------

    def hyper_pre(
        self, name: str, streams: Value, tokens: int, n: int, d: int, rounds: int
    ) -> tuple[Value, Value, Value]:
        logits = self._hyper_logits(f"{name}_fn", streams, tokens, n * d, (2 + n) * n)
        weights = self.stream_weights(logits, tokens, n, rounds)
        del logits
        x = self._mixed(streams, weights[0], tokens, n, d)

        def again(*_: Block) -> Block:
            wide, mixed = self.new(tokens * n * d * FP32), self.new(tokens * d * FP32)
            del wide
            out = self.new(tokens * d * BF16)
            del mixed
            return out

        self.graph.keep(x, again, streams, Value(weights[0].block))
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
