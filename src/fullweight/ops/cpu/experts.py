"""The mixture of experts: dispatch plan, products by expert, sums back by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.cpu.rows import combine, gather_rows
from fullweight.ops.cpu.sizes import sizes
from fullweight.ops.cpu.swiglu import swiglu_rows
from fullweight.ops.late import Late
from fullweight.ops.native import call

LARGE = 512  # rows of an expert beyond which they are rounded up to more
GROUP = 1024  # rows that pass through what is between products together, unless one expert has more


class ExpertMixture(torch.autograd.Function):
    """Rows sorted by expert, a few experts after another so that their rows stay in cache.

    Choices of no expert share one more row, the last, which is zero.
    """

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
        scale = torch.zeros(plan.num_rows + 1)
        scale[plan.place] = weights.detach().float().flatten()
        hidden, out_rows = x.new_empty(plan.num_rows, gate_up.shape[1]), x.new_empty(plan.num_rows + 1, x.shape[1])
        out_rows[-1] = 0
        for group in plan.groups():
            rows = group.rows
            into, back = cast(gate_up[group.experts], x.dtype), cast(down[group.experts], x.dtype)
            multiply(gather_rows(x, plan.token[rows]), into.transpose(1, 2), hidden[rows], group)
            multiply(swiglu_rows(hidden[rows], scale[rows], limit), back.transpose(1, 2), out_rows[rows], group)
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
        dscale, dx_rows = torch.empty_like(scale), x.new_empty(plan.num_rows + 1, x.shape[1])
        dscale[-1], dx_rows[-1] = 0, 0
        f = down.shape[2]
        kept: list[tuple[Group, Tensor, Tensor]] = []
        for group in plan.groups():
            rows = group.rows
            grad_rows = gather_rows(grad, plan.token[rows])
            count = len(grad_rows)
            dactivation, activation = x.new_empty(count, f), x.new_empty(count, f)
            dhidden = x.new_empty(count, 2 * f)
            multiply(grad_rows, cast(down[group.experts], x.dtype), dactivation, group)
            buffers = (dactivation, hidden[rows], scale[rows], dhidden, dscale[rows], activation)
            call("swiglu_backward", *buffers, count, f, float(ctx.limit), torch.get_num_threads(), dtype=x.dtype)
            if ddown is not None:
                outer_products(grad_rows, activation, ddown[group.experts], group)
            if dgate_up is not None:
                outer_products(dhidden, gather_rows(x, plan.token[rows]), dgate_up[group.experts], group)
            multiply(dhidden, cast(gate_up[group.experts], x.dtype), dx_rows[rows], group)
            if any(ctx.late):
                kept.append((group, dhidden, activation))
        late_gate_up, late_down = ctx.late
        if late_gate_up is not None:
            late_gate_up.put(
                lambda: _stacked(gate_up, ((g, h, gather_rows(x, plan.token[g.rows])) for g, h, _ in kept))
            )
        if late_down is not None:
            late_down.put(
                lambda: _stacked(down, ((g, gather_rows(grad, plan.token[g.rows]), a) for g, _, a in kept))
            )
        dx = combine(dx_rows, plan.place, x.shape[0], ctx.top_k)
        dweights = dscale[plan.place].view(-1, ctx.top_k).to(ctx.weights_dtype)
        return dx, None, dweights, dgate_up, ddown, None, None, None


def _stacked(like: Tensor, groups: Iterable[tuple[Group, Tensor, Tensor]]) -> Tensor:
    """The experts' weight gradients, left^T @ right for each (group, left, right)."""
    gradient = torch.empty_like(like)
    for group, left, right in groups:
        outer_products(left, right, gradient[group.experts], group)
    return gradient


@dataclass(frozen=True)
class Group:
    """Neighbouring experts, their rows, and how many rows each has."""

    experts: slice
    rows: slice
    counts: list[int]


@dataclass(frozen=True)
class DispatchPlan:
    """Rows sorted by expert, each expert's padded to a whole number of blocks.

    oneDNN prepares a product for its exact shape, at about the cost of running it once, and counts of tokens
    are different at every step: blocks leave few shapes to prepare. A padding row reads token 0, has weight 0
    and is read by no token. token [rows] int64 is the token that a row reads; place [T * K] the row of each
    choice, `num_rows` for one of no expert; counts the rows of each expert.
    """

    num_rows: int
    token: Tensor
    place: Tensor
    counts: list[int]

    @staticmethod
    def of(chosen: Tensor, num_experts: int) -> DispatchPlan:
        flat = chosen.flatten()
        real = flat.new_zeros(num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))[:-1]
        padded = real + (-real) % torch.where(real > LARGE, 64, 32)
        first_real, first = real.cumsum(0) - real, padded.cumsum(0) - padded
        by_expert = torch.sort(flat, stable=True)
        counts = sizes().rows(padded, len(flat))
        shift = torch.cat((first - first_real, first.new_zeros(1)))[by_expert.values]
        row = torch.arange(flat.shape[0]) + shift
        row = row.masked_fill_(by_expert.values == num_experts, sum(counts))
        place = torch.empty_like(row)
        place[by_expert.indices] = row
        token = torch.zeros(sum(counts) + 1, dtype=torch.int64)
        token[row] = by_expert.indices // chosen.shape[1]
        return DispatchPlan(sum(counts), token, place, counts)

    def groups(self) -> Iterator[Group]:
        """All experts in order, as many together as have `GROUP` rows, at least one."""
        expert = row = 0
        while expert < len(self.counts):
            last, rows = expert + 1, self.counts[expert]
            while last < len(self.counts) and rows + self.counts[last] <= GROUP:
                rows, last = rows + self.counts[last], last + 1
            yield Group(slice(expert, last), slice(row, row + rows), self.counts[expert:last])
            expert, row = last, row + rows


def rounded_rows(rows: int) -> int:
    """What a plan rounds an expert's rows up to."""
    return rows + -rows % (64 if rows > LARGE else 32)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype)


def multiply(left: Tensor, weights: Tensor, out: Tensor, group: Group) -> None:
    """out = left @ weights[expert] for each expert's rows, a tile at a time: few shapes for oneDNN to prepare."""
    tile, counts, chosen = sizes().tile, [], []
    for weight, count in zip(weights.unbind(), group.counts, strict=True):
        for start in range(0, count, tile):
            counts.append(min(tile, count - start))
            chosen.append(weight)
    for a, weight, c in zip(left.split(counts), chosen, out.split(counts), strict=True):
        torch.mm(a, weight, out=c)


def outer_products(left: Tensor, right: Tensor, out: Tensor, group: Group) -> None:
    """out[expert] = left^T @ right over each expert's rows; 0 for one without rows."""
    narrow = left.new_empty(out.shape)
    for a, b, c in zip(left.split(group.counts), right.split(group.counts), narrow.unbind(), strict=True):
        torch.mm(a.T, b, out=c)
    out.copy_(narrow)
