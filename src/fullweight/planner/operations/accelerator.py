"""What the sets for accelerators share (`ops/accelerator.py`, `ops/mixture.py`): operations that keep their inputs
alone, and grouped products over rows sorted by expert. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back
from fullweight.planner.operations.reference import Reference
from fullweight.planner.tape import Block


class Accelerator(Reference, ABC):
    """Each set says what it makes on the way."""

    @abstractmethod
    def turned(self, rows: int, width: int, turned: int, size: int) -> Block:
        """A rotation alone."""

    @abstractmethod
    def activated(self, rows: int, f: int) -> Block:
        """SwiGLU of rows [2f]."""

    @abstractmethod
    def swiglu_back(self, rows: int, f: int) -> Block:
        """Its gradient, 0 where it clamps."""

    def rotary(self, x: Value, rows: int, width: int, turned: int, size: int = BF16) -> Value:
        back = lambda g, s: (self.turned(rows, width, turned, size),)  # noqa: E731
        return self.graph.node(back, [x], [self.turned(rows, width, turned, size)])[0]

    def swiglu(self, hidden: Value, rows: int, f: int) -> Value:
        back = lambda g, s: (self.swiglu_back(rows, f),)  # noqa: E731
        value = self.graph.node(back, [hidden], [self.activated(rows, f)], [hidden])[0]
        return self.graph.keep(value, lambda _: self.activated(rows, f), hidden)

    # ---- routed experts -----------------------------------------------------------------------------

    @abstractmethod
    def _spread(self, rows: int, d: int) -> tuple[Block, Block]:
        """Rows sorted by their experts, and the place of each choice among them."""

    @abstractmethod
    def _again(self, rows: int, d: int) -> Block:
        """Such rows in backward."""

    @abstractmethod
    def _scale(self, rows: int) -> Block:
        """Rows' weights in their order."""

    @abstractmethod
    def _outer(self, weights: int, right: Block) -> Block:
        """A gradient of so many weights; `right` is held until then."""

    @abstractmethod
    def _total(self, result: Block, rows: int, tokens: int, d: int) -> Block:
        """Rows in the order of the tokens, added up."""

    def experts(
        self, x: Value, weights: Value, *, tokens: int, top_k: int, counts: Sequence[int], d: int, f: int
    ) -> Value:
        """Grouped products: each choice's row, sorted by expert."""
        rows, experts = tokens * top_k, len(counts)
        up_, down = experts * 2 * f * d, experts * d * f
        dropped, chosen = self.new(rows), self.new(rows * INT64)
        spread, place = self._spread(rows, d)
        scale = self._scale(rows)
        hidden = self._product(up_, rows * 2 * f)
        scaled = self._scaled(rows, f, self.activated(rows, f))
        out = self._total(self._product(down, rows * d), rows, tokens, d)
        del spread, scaled

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            grad_rows = self._again(rows, d)
            dscaled = self._product(down, rows * f)
            activation = self.activated(rows, f)
            dscale = self._dscale(rows, f)
            given = self._scaled(rows, f)
            dhidden = self.swiglu_back(rows, f)
            del given, dscaled
            dx = self._total(self._product(up_, rows * d), rows, tokens, d)
            x_in = saved[0]

            def of_up() -> Block:
                assert dhidden is not None and x_in is not None  # noqa: PT018
                return self._outer(up_, self._again(rows, d))

            def of_down() -> Block:
                assert grad_rows is not None
                return self._outer(down, self._scaled(rows, f, activation))

            if self.late:
                self.pending.append(lambda: self.weigh("ffn.experts.gate_up", of_up()))
                self.pending.append(lambda: self.weigh("ffn.experts.down", of_down()))
            else:
                first, second = of_up(), of_down()
                self.weigh("ffn.experts.gate_up", first)
                self.weigh("ffn.experts.down", second)
                del first, second
            dweights = self.new(rows * FP32)
            del dscale
            return dx, dweights

        kept: list[Value | Block | None] = [x, chosen, dropped, place, scale, hidden]
        return self.graph.node(backward, [x, weights], [out], kept)[0]

    def _product(self, weights: int, numbers: int) -> Block:
        """Rows by the matrices of their experts, which are cast for it."""
        cast, made = self.new(weights * BF16), self.new(numbers * BF16)
        del cast
        return made

    def _dscale(self, rows: int, f: int) -> Block:
        """The gradient of rows' weights, of products in fp32."""
        wide = self.new(rows * f * FP32), self.new(rows * f * FP32)
        product = self.new(rows * f * FP32)
        del wide
        made = self.new(rows * FP32)
        del product
        return made

    def _scaled(self, rows: int, f: int, activation: Block | None = None) -> Block:
        """Rows times their weights, in fp32 on the way; `activation` is held until then."""
        wide, product = self.new(rows * f * FP32), self.new(rows * f * FP32)
        del wide
        made = self.new(rows * f * BF16)
        del product, activation
        return made
