"""Products with a weight, which is fp32 and cast where it is used (`ops/linear.py`). Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, Back, Base
from fullweight.planner.tape import Block


class Products(Base):
    """The same on every device."""

    def linear(self, name: str, x: Value, rows: int, inputs: int, outputs: int) -> Value:
        """Rows by a weight [outputs, inputs], cast to BF16 and let go."""
        numbers = inputs * outputs
        cast = self.new(numbers * BF16)
        out = self.new(rows * outputs * BF16)
        del cast
        needs = x.source is not None

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = None
            if needs:
                cast = self.new(numbers * BF16)
                dx = self.new(rows * inputs * BF16)
                del cast
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                narrow = self.new(numbers * BF16)
                wide = self.new(numbers * FP32)
                del narrow
                self.weigh(name, wide)

            if needs:
                self._later(product)
            else:
                product()
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]

    def again_linear(self, rows: int, inputs: int, outputs: int) -> Callable[[Block], Block]:
        """`linear`, made again from what was kept."""

        def again(_: Block) -> Block:
            cast = self.new(inputs * outputs * BF16)
            made = self.new(rows * outputs * BF16)
            del cast
            return made

        return again

    def grouped_linear(self, name: str, x: Value, rows: int, groups: int, inputs: int, outputs: int) -> Value:
        """Block-diagonal: `groups` of a weight [outputs, inputs] each."""
        numbers = groups * inputs * outputs
        cast = self.new(numbers * BF16)
        out = self.new(rows * groups * outputs * BF16)
        self.new(rows * outputs * BF16)
        del cast

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = self.new(rows * groups * inputs * BF16)
            cast = self.new(numbers * BF16)
            self.new(rows * inputs * BF16)
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                made = self.new(numbers * FP32)
                self.new(inputs * outputs * BF16)
                self.weigh(name, made)

            self._later(product)
            del cast
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]

    def wide_linear(self, name: str, x: Value, rows: int, inputs: int, outputs: int) -> Value:
        """In fp32: the rows are cast, the weight is not."""
        cast = self.new(rows * inputs * FP32)
        out = self.new(rows * outputs * FP32)
        del cast
        needs = x.source is not None

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = None
            if needs:
                wide = self.new(rows * inputs * FP32)
                dx = self.new(rows * inputs * BF16)
                del wide
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                wide = self.new(rows * inputs * FP32)
                made = self.new(inputs * outputs * FP32)
                del wide
                self.weigh(name, made)

            if needs:
                self._later(product)
            else:
                product()
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]
