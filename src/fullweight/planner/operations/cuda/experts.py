"""Routed experts and the head of an NVIDIA GPU. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back
from fullweight.planner.operations.cuda.elementwise import CudaElementwise
from fullweight.planner.operations.reference import LOGITS
from fullweight.planner.tape import Block


class CudaExperts(CudaElementwise):
    """torch's grouped products over rows by index, and the reference's logits, made again in backward."""

    head_in_forward = False

    def _spread(self, rows: int, d: int) -> tuple[Block, Block]:
        values, order = self.new(rows * INT64), self.new(rows * INT64)
        del values
        place, numbers = self.new(rows * INT64), self.new(rows * INT64)
        del numbers
        token = self.new(rows * INT64)
        made = self.new(rows * d * BF16)
        del order, token
        return made, place

    def _again(self, rows: int, d: int) -> Block:
        return self._spread(rows, d)[0]

    def _scale(self, rows: int) -> Block:
        empty, made = self.new(rows * FP32), self.new(rows * FP32)
        del empty
        return made

    def _outer(self, weights: int, right: Block) -> Block:
        """Narrow first."""
        narrow, made = self.new(weights * BF16), self.new(weights * FP32)
        del narrow, right
        return made

    def _total(self, result: Block, rows: int, tokens: int, d: int) -> Block:
        ordered, made = self.new(rows * d * BF16), self.new(tokens * d * BF16)
        del ordered, result
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
