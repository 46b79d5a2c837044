"""Routed experts and the head of an NVIDIA GPU. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back
from fullweight.planner.operations.cuda.elementwise import CudaElementwise
from fullweight.planner.tape import Block

LOGITS = 1024  # TOKEN_CHUNK of ops/reference.py


class CudaExperts(CudaElementwise):
    """torch's grouped products over rows by index, and the reference's logits, made again in backward."""

    head_in_forward = False

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
            grad_rows, _ = self._spread(rows, d)
            del _
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
                again = self._spread(rows, d)[0]
                return self._outer(up_, again)

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

    def _spread(self, rows: int, d: int) -> tuple[Block, Block]:
        """Rows sorted by their experts, and the place of each choice among them."""
        values, order = self.new(rows * INT64), self.new(rows * INT64)
        del values
        place, numbers = self.new(rows * INT64), self.new(rows * INT64)
        del numbers
        token = self.new(rows * INT64)
        made = self.new(rows * d * BF16)
        del order, token
        return made, place

    def _scale(self, rows: int) -> Block:
        empty, made = self.new(rows * FP32), self.new(rows * FP32)
        del empty
        return made

    def _product(self, weights: int, numbers: int) -> Block:
        """Rows by the matrices of their experts, which are cast for it."""
        cast, made = self.new(weights * BF16), self.new(numbers * BF16)
        del cast
        return made

    def _outer(self, weights: int, right: Block) -> Block:
        """A gradient of so many weights, narrow first."""
        narrow, made = self.new(weights * BF16), self.new(weights * FP32)
        del narrow, right
        return made

    def _total(self, result: Block, rows: int, tokens: int, d: int) -> Block:
        """Rows in the order of the tokens, added up."""
        ordered, made = self.new(rows * d * BF16), self.new(tokens * d * BF16)
        del ordered, result
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

    # ---- the head -----------------------------------------------------------------------------------

    def cross_entropy(self, hidden: Value, tokens: int, vocabulary: int, d: int) -> Value:
        """A chunk of logits at a time, made again in backward; the head's gradient is a sum over chunks."""
        sizes = [min(LOGITS, tokens - start) for start in range(0, tokens, LOGITS)][:3]  # more of them do the same
        self.head_parts = len(sizes)
        self.new(tokens * FP32)

        def log_probabilities(rows: int) -> tuple[Block, Block]:
            cast, narrow = self.new(vocabulary * d * BF16), self.new(rows * vocabulary * BF16)
            return cast, self._log_softmax(rows * vocabulary, narrow)

        for rows in sizes:
            log_probabilities(rows)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dhidden = None
            for rows in reversed(sizes):
                cast, known = log_probabilities(rows)
                picked = self.new(rows * vocabulary * FP32)
                wide = self.new(rows * vocabulary * FP32)
                del known, picked
                dlogits = self.new(rows * vocabulary * BF16)
                del wide
                part, dhead = self.new(rows * d * BF16), self.new(vocabulary * d * BF16)
                del dlogits, cast
                wide = self.new(vocabulary * d * FP32)
                del dhead
                self.weigh("head.weight", wide)
                del wide
                spread = self.new(tokens * d * BF16)
                del part
                dhidden = spread if dhidden is None else self.new(tokens * d * BF16)
                del spread
            return (dhidden,)

        return self.graph.node(backward, [hidden], [self.new(4)], [hidden])[0]

    def _log_softmax(self, numbers: int, narrow: Block) -> Block:
        wide = self.new(numbers * FP32)
        del narrow
        made = self.new(numbers * FP32)
        del wide
        return made
