"""Routed experts and the head of an Ascend die. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.ascend.elementwise import AscendElementwise
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64, Back
from fullweight.planner.tape import Block

LOGITS = 1024  # TOKEN_CHUNK of ops/reference.py


class AscendExperts(AscendElementwise):
    """Grouped products, and logits in fp32."""

    def experts(
        self, x: Value, weights: Value, *, tokens: int, top_k: int, counts: Sequence[int], d: int, f: int
    ) -> Value:
        """Grouped products: each choice's row, sorted by expert."""
        rows, experts = tokens * top_k, len(counts)
        up_, down = experts * 2 * f * d, experts * d * f
        chosen, dropped = self.new(rows * INT64), self.new(rows)
        spread, place = self.new(rows * d * BF16), self.new(rows * INT32)
        scale = self.new(rows * FP32)
        cast = self.new(up_ * BF16)
        hidden = self.new(rows * 2 * f * BF16)
        del cast
        scaled = self._scaled(rows, f, self.new(rows * f * BF16))
        cast = self.new(down * BF16)
        result = self.new(rows * d * BF16)
        del cast
        out = self.new(tokens * d * BF16)
        del spread, scaled, result

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            grad_rows = self.new(rows * d * BF16)
            cast = self.new(down * BF16)
            dscaled = self.new(rows * f * BF16)
            del cast
            activation = self.new(rows * f * BF16)
            dscale = self._dscale(rows, f)
            given = self._scaled(rows, f)
            dhidden = self.swiglu_back(rows, f)
            del given, dscaled
            dx = self._dx(up_, rows, tokens, d)
            x_in = saved[0]

            def of_up() -> Block:
                assert dhidden is not None and x_in is not None  # noqa: PT018
                again = self.new(rows * d * BF16)
                made = self.new(up_ * FP32)
                del again
                return made

            def of_down() -> Block:
                assert grad_rows is not None
                scaled = self._scaled(rows, f, activation)
                made = self.new(down * FP32)
                del scaled
                return made

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

    def _dx(self, weights: int, rows: int, tokens: int, d: int) -> Block:
        """The gradient of the tokens, by so many weights."""
        cast = self.new(weights * BF16)
        back = self.new(rows * d * BF16)
        del cast
        made = self.new(tokens * d * BF16)
        del back
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

    def cross_entropy(self, hidden: Value, tokens: int, vocabulary: int, d: int) -> Value:
        """Gradients are formed in forward, the head's as a whole from the beginning."""
        cast, log_probs = self.new(vocabulary * d * BF16), self.new(tokens * FP32)
        dhidden, dhead = self.new(tokens * d * BF16), self.new(vocabulary * d * FP32)
        logits = log_prob = dlogits = None
        for start in range(0, tokens, LOGITS)[:2]:  # more of them do the same
            size = min(LOGITS, tokens - start) * vocabulary
            narrow = self.new(size * BF16)
            logits = self.new(size * FP32)
            del narrow
            log_prob = self.new(size * FP32)
            wide = self.new(size * FP32)
            dlogits = self.new(size * BF16)
            del wide
            part = self.new(vocabulary * d * BF16)
            del part
        del cast, log_probs, logits, log_prob, dlogits
        return self.loss(hidden, dhidden, dhead)
