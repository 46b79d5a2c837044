"""Norms, rotations and SwiGLU of `ops/fused.py`, formula by formula. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.accelerator import Accelerator
from fullweight.planner.operations.base import BF16, FP32, Back
from fullweight.planner.tape import Block


class CudaElementwise(Accelerator):
    """Formulas in fp32 over rows that are kept as they came; a name that is given anew is one of the formula's."""

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
        """Keeps its input alone."""
        weighed = name is not None

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = self._norm_back(rows, width, size, turned, weighed=weighed)
            if name is not None:
                self.weigh(name, self.new(width * FP32))
            return (dx,)

        out = self._normed(rows, width, size, turned, weighed=weighed)
        value = self.graph.node(backward, [x], [out], [x])[0]
        if keep:
            self.graph.keep(value, lambda _: self._normed(rows, width, size, turned, weighed=weighed), x)
        return value

    def activated(self, rows: int, f: int) -> Block:
        """SwiGLU of rows [2f]."""
        size = rows * f * FP32
        wide = self.new(2 * size)
        clamped = self.new(size)
        gate = self.new(size)
        del clamped
        up = self.new(size)
        product = self.new(size)
        del gate, up
        made = self.new(rows * f * BF16)
        del wide, product
        return made

    def swiglu_back(self, rows: int, f: int) -> Block:
        """Its gradient, 0 where it clamps."""
        size, flags = rows * f * FP32, rows * f
        wide, given = self.new(2 * size), self.new(size)
        low, share = self.new(size), self.new(size)
        up = self.new(size)
        product = self.new(size)
        del up
        product = self.new(size)
        rest = self.new(size)
        for _ in range(2):
            rest = self.new(size)
        product = self.new(size)
        del rest
        inside = self.new(flags)
        dgate = self.new(size)
        del product, inside
        product = self.new(size)
        product = self.new(size)
        inside = self.new(flags)
        dup = self.new(size)
        del product, inside
        joined = self.new(2 * size)
        made = self.new(2 * rows * f * BF16)
        del wide, given, low, share, dgate, dup, joined
        return made

    # ---- norm and rotation --------------------------------------------------------------------------

    def _rotated(self, rows: int, width: int, turned: int) -> Block:
        """Wide rows with their last pairs turned."""
        half = rows * turned // 2 * FP32

        def mixed() -> Block:
            both = self.new(half), self.new(half)
            made = self.new(half)
            del both
            return made

        pair = mixed(), mixed()
        stacked = self.new(2 * half)
        del pair
        made = self.new(rows * width * FP32)
        del stacked
        return made

    def turned(self, rows: int, width: int, turned: int, size: int) -> Block:
        """A rotation alone."""
        wide = self.new(rows * width * FP32 if size < FP32 else 0)
        made = self._rotated(rows, width, turned)
        del wide
        return self.new(rows * width * size) if size < FP32 else made

    def _normed(self, rows: int, width: int, size: int, turned: int, *, weighed: bool) -> Block:
        numbers = rows * width * FP32
        y = self.new(numbers if size < FP32 else 0)
        square = self.new(numbers)
        del square
        for _ in range(2 if weighed else 1):
            y = self.new(numbers)
        if turned:
            y = self._rotated(rows, width, turned)
        return self.new(rows * width * size) if size < FP32 else y

    def _norm_back(self, rows: int, width: int, size: int, turned: int, *, weighed: bool) -> Block:
        numbers = rows * width * FP32
        y, given = [self.new(numbers if size < FP32 else 0) for _ in range(2)]
        square = self.new(numbers)
        del square
        y = self.new(numbers)
        if turned:
            given = self._rotated(rows, width, turned)
        scaled = self.new(numbers) if weighed else given
        product = self.new(numbers)
        del product
        product = self.new(numbers)
        rest = self.new(numbers)
        del product
        dx = self.new(numbers)
        del rest
        if size < FP32:
            dx = self.new(rows * width * size)
        if weighed:
            self.new(numbers)
        del y, given, scaled
        return dx
