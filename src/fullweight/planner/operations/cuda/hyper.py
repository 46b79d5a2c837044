"""Hyper-connections of `ops/fused.py`, which keep the streams as they came. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, Back
from fullweight.planner.operations.cuda.elementwise import CudaElementwise
from fullweight.planner.tape import Block


class CudaHyper(CudaElementwise):
    """What a sublayer takes from the streams and gives to them."""

    def _hyper_logits(self, name: str, streams: Value, tokens: int, width: int, maps: int) -> Value:
        """A product in fp32 over the root of the streams' mean square; keeps the streams, its output, the root."""
        numbers = tokens * width
        flat, square = self.new(numbers * FP32), self.new(numbers * FP32)
        inverse = self.new(tokens * FP32)
        del square
        product, out = self.new(tokens * maps * FP32), self.new(tokens * maps * FP32)
        del flat, product

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            flat, scaled = self.new(numbers * FP32), self.new(tokens * maps * FP32)
            product = self.new(numbers * FP32)
            dflat = self.new(numbers * FP32)
            del product
            dstreams = self.new(numbers * BF16)
            dweight = self.new(maps * width * FP32)
            del flat, scaled, dflat
            self.weigh(name, dweight)
            return (dstreams,)

        return self.graph.node(backward, [streams], [out], [streams, inverse, out])[0]

    def _mixed(self, streams: Value, pre: Value, tokens: int, n: int, d: int) -> Value:
        """The streams' weighted sum."""
        numbers = tokens * n * d

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given, product = self.new(tokens * d * FP32), self.new(numbers * FP32)
            dstreams = self.new(numbers * BF16)
            del product
            wide = self.new(numbers * FP32)
            product = self.new(numbers * FP32)
            dpre = self.new(tokens * n * FP32)
            del given, wide, product
            return dstreams, dpre

        return self.graph.node(backward, [streams, pre], [self._sum(tokens, n, d)], [streams, pre])[0]

    def _sum(self, tokens: int, n: int, d: int) -> Block:
        wide, product = self.new(tokens * n * d * FP32), self.new(tokens * n * d * FP32)
        del wide
        total = self.new(tokens * d * FP32)
        del product
        made = self.new(tokens * d * BF16)
        del total
        return made

    def hyper_post(self, streams: Value, y: Value, post: Value, comb: Value, tokens: int, n: int, d: int) -> Value:
        """Keeps its inputs; every stream's part of every stream is there in fp32 on the way."""
        numbers = tokens * n * d

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given, wide = self.new(numbers * FP32), self.new(numbers * FP32)
            every = self.new(n * numbers * FP32)
            dwide = self.new(numbers * FP32)
            del every
            product = self.new(numbers * FP32)
            dy_wide = self.new(tokens * d * FP32)
            del product
            y_wide, product = self.new(tokens * d * FP32), self.new(numbers * FP32)
            del y_wide
            dpost = self.new(tokens * n * FP32)
            del product
            every = self.new(n * numbers * FP32)
            dcomb = self.new(tokens * n * n * FP32)
            del every
            dstreams, dy = self.new(numbers * BF16), self.new(tokens * d * BF16)
            del given, wide, dwide, dy_wide
            return dstreams, dy, dpost, dcomb

        inputs = [streams, y, post, comb]
        return self.graph.node(backward, inputs, [self._given(tokens, n, d)], inputs)[0]

    def _given(self, tokens: int, n: int, d: int) -> Block:
        numbers = tokens * n * d
        wide, every = self.new(numbers * FP32), self.new(n * numbers * FP32)
        del wide
        mixed = self.new(numbers * FP32)
        del every
        wide, product = self.new(tokens * d * FP32), self.new(numbers * FP32)
        del wide
        total = self.new(numbers * FP32)
        del product
        made = self.new(numbers * BF16)
        del mixed, total
        return made

    def again_post(self, tokens: int, n: int, d: int) -> Callable[..., Block]:
        return lambda *_: self._given(tokens, n, d)
