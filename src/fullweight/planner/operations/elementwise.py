"""Norms, rotations, SwiGLU and hyper-connections of a CPU (`ops/cpu`). Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, Back, Base
from fullweight.planner.tape import Block


class Elementwise(Base):
    """What goes over rows of channels."""

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
        """RMSNorm, with a rotation of the last `turned` channels or without: rows' factors are kept beside the
        input."""
        out, factors = self.new(rows * width * size), self.new(rows * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = self.new(rows * width * size)
            if name is not None:
                self.weigh(name, self.new(width * FP32))
            return (dx,)

        value = self.graph.node(backward, [x], [out], [x, factors])[0]
        if keep:

            def again(_: Block) -> Block:
                out = self.new(rows * width * size)
                self.new(rows * FP32)
                return out

            self.graph.keep(value, again, x)
        return value

    def rotary(self, x: Value, rows: int, width: int, turned: int, size: int = BF16) -> Value:
        """A rotation alone keeps only its tables."""
        out = self.new(rows * width * size)
        return self.graph.node(lambda g, s: (self.new(rows * width * size),), [x], [out])[0]

    def swiglu(self, hidden: Value, rows: int, f: int) -> Value:
        """Keeps its input."""
        out = self.new(rows * f * BF16)
        value = self.graph.node(lambda g, s: (self.new(rows * 2 * f * BF16),), [hidden], [out], [hidden])[0]
        return self.graph.keep(value, lambda _: self.new(rows * f * BF16), hidden)

    def hyper_pre(
        self, name: str, streams: Value, tokens: int, n: int, d: int, rounds: int
    ) -> tuple[Value, Value, Value]:
        """(input, post, comb); comb by so many rounds of Sinkhorn."""
        maps = (2 + n) * n
        x, post = self.new(tokens * d * BF16), self.new(tokens * n * FP32)
        comb, pre = self.new(tokens * n * n * FP32), self.new(tokens * n * FP32)
        logits, factors = self.new(tokens * maps * FP32), self.new(tokens * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dstreams = self.new(tokens * n * d * BF16)
            partial = self.new(maps * n * d * FP32)
            self.weigh(f"{name}_fn", self.new(maps * n * d * FP32))
            del partial
            return (dstreams,)

        made = self.graph.node(backward, [streams], [x, post, comb, pre], [streams, pre, logits, factors])
        self.graph.keep(made[0], lambda *_: self.new(tokens * d * BF16), streams, Value(pre))
        return made[0], made[1], made[2]

    def hyper_post(self, streams: Value, y: Value, post: Value, comb: Value, tokens: int, n: int, d: int) -> Value:
        """The streams behind a sublayer."""
        out = self.new(tokens * n * d * BF16)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            sizes = tokens * n * d * BF16, tokens * d * BF16, tokens * n * FP32, tokens * n * n * FP32
            return tuple([self.new(size) for size in sizes])

        inputs = [streams, y, post, comb]
        return self.graph.node(backward, inputs, [out], inputs)[0]

    def again_post(self, tokens: int, n: int, d: int) -> Callable[..., Block]:
        """`hyper_post`, made again from what was kept."""
        return lambda *_: self.new(tokens * n * d * BF16)

    def hyper_head(self, name: str, streams: Value, tokens: int, n: int, d: int) -> Value:
        x, pre = self.new(tokens * d * BF16), self.new(tokens * n * FP32)
        logits, factors = self.new(tokens * n * FP32), self.new(tokens * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dstreams = self.new(tokens * n * d * BF16)
            partial = self.new(n * n * d * FP32)
            self.weigh(f"{name}_fn", self.new(n * n * d * FP32))
            del partial
            return (dstreams,)

        return self.graph.node(backward, [streams], [x], [streams, pre, logits, factors])[0]
