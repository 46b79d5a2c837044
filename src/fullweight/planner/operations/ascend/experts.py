"""Routed experts and the head of an Ascend die. Imports no torch."""

from __future__ import annotations

from fullweight.planner.graph import Value
from fullweight.planner.operations.ascend.elementwise import AscendElementwise
from fullweight.planner.operations.base import BF16, FP32, INT32
from fullweight.planner.operations.reference import LOGITS
from fullweight.planner.tape import Block


class AscendExperts(AscendElementwise):
    """Grouped products, and logits in fp32."""

    def _spread(self, rows: int, d: int) -> tuple[Block, Block]:
        return self.new(rows * d * BF16), self.new(rows * INT32)

    def _again(self, rows: int, d: int) -> Block:
        return self.new(rows * d * BF16)

    def _scale(self, rows: int) -> Block:
        return self.new(rows * FP32)

    def _outer(self, weights: int, right: Block) -> Block:
        made = self.new(weights * FP32)
        del right
        return made

    def _total(self, result: Block, rows: int, tokens: int, d: int) -> Block:
        made = self.new(tokens * d * BF16)
        del result
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
