"""Norms, rotations and SwiGLU of an Ascend die. Imports no torch."""

from __future__ import annotations

from fullweight.planner.graph import Value
from fullweight.planner.operations.accelerator import Accelerator
from fullweight.planner.operations.base import BF16, FP32
from fullweight.planner.tape import Block


class AscendElementwise(Accelerator):
    """A rotation is an operation of its own."""

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
                made = self.turned(rows, width, turned, size)
                del normed, factors
                return made

            self.graph.keep(value, again, x)
        return value

    def turned(self, rows: int, width: int, turned: int, size: int) -> Block:
        """The last channels in fp32, turned and put behind the others."""
        part = self.new(rows * turned * FP32 if size < FP32 else 0)
        other = self.new(rows * turned * FP32)
        narrow = self.new(rows * turned * size if size < FP32 else 0)
        out = self.new(rows * width * size)
        del part, other, narrow
        return out

    def activated(self, rows: int, f: int) -> Block:
        return self.new(rows * f * BF16)

    def swiglu_back(self, rows: int, f: int) -> Block:
        """The gradient at the clamped input, 0 where it clamps."""
        halves = self.new(rows * f * BF16), self.new(rows * f * BF16)
        clamped = self.new(rows * 2 * f * BF16)
        del halves
        inner, differs = self.new(rows * 2 * f * BF16), self.new(rows * 2 * f)
        made = self.new(rows * 2 * f * BF16)
        del clamped, inner, differs
        return made
