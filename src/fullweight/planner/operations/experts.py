"""Routed experts and the head of a CPU (`ops/cpu/experts.py`, `loss.py`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations.base import BF16, FP32, INT64, Back, Base, up
from fullweight.planner.tape import Block

GROUP, LARGE = 1024, 512  # of ops/cpu/experts.py
LOGITS, ROWS = 1 << 23, 512  # of ops/cpu/loss.py


class Experts(Base):
    """What takes rows by expert, and logits a few rows at a time."""

    def experts(
        self, x: Value, weights: Value, *, tokens: int, top_k: int, counts: Sequence[int], d: int, f: int
    ) -> Value:
        """Rows by expert: `counts` of each, over `tokens` x `top_k` choices."""
        rows, choices, experts = sum(counts), tokens * top_k, len(counts)
        token, place = self.new((rows + 1) * INT64), self.new(choices * INT64)
        scale = self.new((rows + 1) * FP32)
        hidden = self.new(rows * 2 * f * BF16)
        out_rows = self.new((rows + 1) * d * BF16)
        groups = grouped(counts)
        shown = groups if self.late else groups[:3]  # more of them do the same

        cast = None
        for number, count in shown:
            cast = self.new(number * 2 * f * d * BF16), self.new(number * d * f * BF16)
            self.new(count * d * BF16)
            self.new(count * f * BF16)
        out = self.new(tokens * d * BF16)
        del out_rows, cast

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            weighed = (
                None if self.late else (self.new(experts * 2 * f * d * FP32), self.new(experts * d * f * FP32))
            )
            dscale, dx_rows = self.new((rows + 1) * FP32), self.new((rows + 1) * d * BF16)
            kept: list[tuple[Block, Block]] = []
            grad_rows = pair = dhidden = buffers = None
            for number, count in shown:
                grad_rows = self.new(count * d * BF16)
                pair = self.new(count * f * BF16), self.new(count * f * BF16)
                dhidden = self.new(count * 2 * f * BF16)
                self.new(number * d * f * BF16)
                buffers = (*pair, dhidden)  # holds those of the turn before until now
                if weighed is not None:
                    self.new(number * d * f * BF16)
                    again = self.new(count * d * BF16)
                    narrow = self.new(number * 2 * f * d * BF16)
                    del again, narrow
                self.new(number * 2 * f * d * BF16)
                if self.late:
                    kept.append((dhidden, pair[1]))
            # what the loop's last turn made is there to the end
            if self.late:
                grad, rows_in = gradients[0], saved[0]

                def product(name: str, numbers: int, each: int) -> None:
                    assert grad is not None and rows_in is not None and kept is not None  # noqa: PT018
                    made = self.new(experts * numbers * FP32)
                    for number, count in groups:
                        gathered = self.new(count * each * BF16)
                        narrow = self.new(number * numbers * BF16)
                        del gathered, narrow
                    self.weigh(name, made)

                self.pending.append(lambda: product("ffn.experts.gate_up", 2 * f * d, d))
                self.pending.append(lambda: product("ffn.experts.down", d * f, d))
            dx = self.new(tokens * d * BF16)
            dweights = self.new(choices * FP32)
            del dscale, dx_rows
            if weighed is not None:
                self.weigh("ffn.experts.gate_up", weighed[0])
                self.weigh("ffn.experts.down", weighed[1])
            del grad_rows, pair, dhidden, buffers
            return dx, dweights

        return self.graph.node(backward, [x, weights], [out], [x, hidden, scale], (token, place))[0]

    def cross_entropy(self, hidden: Value, tokens: int, vocabulary: int, d: int) -> Value:
        """Gradients are formed in forward, a few logits at a time."""
        cast, log_probs = self.new(vocabulary * d * BF16), self.new(tokens * FP32)
        dhidden, dhead = self.new(tokens * d * BF16), None
        rows = max(LOGITS // vocabulary, ROWS)
        logits = part = None
        for start in range(0, tokens, rows)[:2]:  # more of them do the same
            logits = self.new(min(rows, tokens - start) * vocabulary * BF16)
            part = self.new(vocabulary * d * BF16)
            if dhead is None:
                dhead = self.new(vocabulary * d * FP32)
        del cast, log_probs, logits, part
        assert dhead is not None
        return self.loss(hidden, dhidden, dhead)


def grouped(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(experts, rows) that pass between products together."""
    found, number, rows = [], 0, 0
    for count in counts:
        if number and rows + count > GROUP:
            found.append((number, rows))
            number, rows = 0, 0
        number, rows = number + 1, rows + count
    return [*found, (number, rows)] if number else found


def rounded_rows(rows: int) -> int:
    """What an expert's rows are rounded up to."""
    return up(rows, 64 if rows > LARGE else 32)
