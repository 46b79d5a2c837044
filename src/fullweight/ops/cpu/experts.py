"""The mixture of experts: dispatch plan, products by expert, sums back by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.cpu.rows import combine, gather_rows
from fullweight.ops.cpu.swiglu import swiglu_rows
from fullweight.ops.late import Late
from fullweight.ops.native import call

TILE = 512  # rows of an expert that share one product


class ExpertMixture(torch.autograd.Function):
    """Dropless experts: rows sorted by expert, one expert after another so that its rows stay in cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        limit: float,
        late_gate_up: Late | None,
        late_down: Late | None,
    ) -> Tensor:
        tokens, top_k = chosen.shape
        plan = DispatchPlan.of(chosen, gate_up.shape[0])
        scale = torch.zeros(plan.num_rows)
        scale[plan.place] = weights.detach().float().flatten()
        hidden, out_rows = x.new_empty(plan.num_rows, gate_up.shape[1]), x.new_empty(plan.num_rows, x.shape[1])
        for expert, rows in plan.experts():
            into, down_weight = cast(gate_up[expert], x.dtype), cast(down[expert], x.dtype)
            mm_tiles(gather_rows(x, plan.token[rows]), into.T, hidden[rows])
            mm_tiles(swiglu_rows(hidden[rows], scale[rows], limit), down_weight.T, out_rows[rows])
        ctx.save_for_backward(x, hidden, scale, gate_up, down)
        ctx.plan, ctx.limit, ctx.top_k, ctx.weights_dtype = plan, limit, top_k, weights.dtype
        ctx.late = late_gate_up, late_down
        return combine(out_rows, plan.place, tokens, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, scale, gate_up, down = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        dgate_up, ddown = (
            torch.empty_like(weight) if wanted else None
            for weight, wanted in zip((gate_up, down), ctx.needs_input_grad[3:5], strict=True)
        )
        for gradient in (dgate_up, ddown):
            if gradient is not None:
                gradient[plan.idle()] = 0
        dscale, dx_rows = torch.empty_like(scale), x.new_empty(plan.num_rows, x.shape[1])
        f = down.shape[2]
        kept: list[tuple[int, slice, Tensor, Tensor]] = []
        for expert, rows in plan.experts():
            grad_rows = gather_rows(grad, plan.token[rows])
            count = len(grad_rows)
            dactivation, activation = x.new_empty(count, f), x.new_empty(count, f)
            dhidden = x.new_empty(count, 2 * f)
            mm_tiles(grad_rows, cast(down[expert], x.dtype), dactivation)
            buffers = (dactivation, hidden[rows], scale[rows], dhidden, dscale[rows], activation)
            call("swiglu_backward", *buffers, count, f, float(ctx.limit), torch.get_num_threads(), dtype=x.dtype)
            if ddown is not None:
                ddown[expert] = grad_rows.T @ activation
            if dgate_up is not None:
                dgate_up[expert] = dhidden.T @ gather_rows(x, plan.token[rows])
            mm_tiles(dhidden, cast(gate_up[expert], x.dtype), dx_rows[rows])
            if any(ctx.late):
                kept.append((expert, rows, dhidden, activation))
        late_gate_up, late_down = ctx.late
        if late_gate_up is not None:
            late_gate_up.put(
                lambda: _stacked(gate_up, plan, ((e, h, gather_rows(x, plan.token[r])) for e, r, h, _ in kept))
            )
        if late_down is not None:
            late_down.put(
                lambda: _stacked(down, plan, ((e, gather_rows(grad, plan.token[r]), a) for e, r, _, a in kept))
            )
        dx = combine(dx_rows, plan.place, x.shape[0], ctx.top_k)
        dweights = dscale[plan.place].view(-1, ctx.top_k).to(ctx.weights_dtype)
        return dx, None, dweights, dgate_up, ddown, None, None, None


def _stacked(like: Tensor, plan: DispatchPlan, pairs: Iterable[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The experts' weight gradients, left^T @ right for each (expert, left, right)."""
    gradient = torch.empty_like(like)
    gradient[plan.idle()] = 0
    for expert, left, right in pairs:
        gradient[expert] = left.T @ right
    return gradient


@dataclass(frozen=True)
class DispatchPlan:
    """Rows sorted by expert, each expert's padded to a whole number of blocks.

    oneDNN prepares a product for its exact shape, at about the cost of running it once, and counts of tokens
    are different at every step: blocks leave few shapes to prepare. A padding row reads token 0, has weight 0
    and is read by no token. token [rows] int64 is the token that a row reads; place [T * K] the row of each
    choice; counts the rows of each expert.
    """

    num_rows: int
    token: Tensor
    place: Tensor
    counts: list[int]

    @staticmethod
    def of(chosen: Tensor, num_experts: int) -> DispatchPlan:
        flat = chosen.flatten()
        real = torch.bincount(flat, minlength=num_experts)
        block = torch.where(real > TILE // 2, 64, 32)
        padded = (real + block - 1) // block * block
        first_real, first = real.cumsum(0) - real, padded.cumsum(0) - padded
        order = torch.sort(flat, stable=True).indices
        row = torch.arange(flat.shape[0]) + (first - first_real)[flat[order]]
        place = torch.empty_like(order)
        place[order] = row
        counts = padded.tolist()
        token = torch.zeros(sum(counts), dtype=torch.int64)
        token[row] = order // chosen.shape[1]
        return DispatchPlan(len(token), token, place, counts)

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and which they are."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def idle(self) -> list[int]:
        """Experts that no token chose."""
        return [expert for expert, count in enumerate(self.counts) if not count]


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype)


def mm_tiles(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, `TILE` rows at a time: few shapes for oneDNN to prepare."""
    for a in range(0, left.shape[0], TILE):
        torch.mm(left[a : a + TILE], right, out=out[a : a + TILE])
