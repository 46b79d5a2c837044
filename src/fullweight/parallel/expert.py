"""Expert parallelism: every token's row travels to the ranks that hold its experts, and the results come back.

A rank takes whatever rows the router sends it, none included, so sizes differ at every call and are exchanged
first; choices of no expert, those beyond a capacity, are not sent. Rows are sorted by expert, which sorts them by
rank, because a rank's experts are neighbours; the receiver needs only how many rows each source has for each of
its experts. What comes back is put in the order of the choices and summed over a token's choices in that order, so
the same layout gives the same bits.

Three exchanges go out (counts, rows in the compute type, weights in fp32) and one comes back; their gradients
travel the other way. A rank without rows takes part in all of them.

Left out: overlap of the exchange with the shared expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fullweight.core.tensors import local_part
from fullweight.ops.mixture import by_expert, row_counts
from fullweight.parallel.collectives import exchange_rows

Compute = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows [R, d], local expert of each [R, 1], weights [R, 1], gate_up, down of the local experts) -> [R, d]."""


@dataclass(frozen=True)
class Plan:
    """Where one call's rows go. Choices are the T * K pairs of token and expert, in the router's order.

    S of them are sent: all but those of no expert.
    """

    top_k: int
    order: Tensor  # [S] int64: choices sorted by expert
    place: Tensor  # [T * K] int64: where each choice stands in that order; S and above: nowhere
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    experts: Tensor  # [R, 1] int64: local expert of each received row


class ExpertExchange:
    """Dispatch of one group of expert ranks; the model's `Experts` call it where they are cut."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, compute: Compute
    ) -> Tensor:
        """x [T, d], chosen and weights [T, K], parameters cut along experts -> [T, d], as if they were whole.

        The number of all experts in `chosen` is no expert.
        """
        local_gate_up, local_down = local_part(gate_up), local_part(down)
        plan = self.plan(chosen, local_gate_up.shape[0])
        rows = exchange_rows(_Spread.apply(x, plan), plan.sent, plan.received, self.group)
        scale = exchange_rows(_Sort.apply(weights.reshape(-1, 1), plan), plan.sent, plan.received, self.group)
        result = compute(rows, plan.experts, scale, local_gate_up, local_down)
        back = exchange_rows(result, plan.received, plan.sent, self.group)
        return _Combine.apply(back, plan)

    def plan(self, chosen: Tensor, num_local: int) -> Plan:
        """Sort the choices [T, K] and tell every rank what it will get; waits for the device."""
        order, place = by_expert(chosen)
        to_each = row_counts(chosen, self.size * num_local + 1)[:-1].view(self.size, num_local)
        from_each = torch.empty_like(to_each)
        dist.all_to_all_single(from_each, to_each, group=self.group)
        sent, received = self.sizes(to_each, from_each, *chosen.shape)
        experts = torch.arange(num_local, device=chosen.device).repeat(self.size)
        experts = experts.repeat_interleave(from_each.flatten(), output_size=sum(received)).unsqueeze(1)
        return Plan(chosen.shape[1], order[: sum(sent)], place, sent, received, experts)

    def sizes(
        self, to_each: Tensor, from_each: Tensor, num_tokens: int, top_k: int
    ) -> tuple[list[int], list[int]]:
        """Rows to and from each rank, of counts [ranks, local experts]: the one place that reads values.

        At most `num_tokens` x `top_k` choices are sent. Tensors without values answer by what a routing gives.
        """
        return to_each.sum(1).tolist(), from_each.sum(1).tolist()


class _Spread(torch.autograd.Function):
    """x [T, d] -> [S, d]: each token's row once for each of its choices, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.order // plan.top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.plan), None


class _Combine(torch.autograd.Function):
    """[S, d] sorted by expert -> [T, d]: the sum over each token's choices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _summed(rows, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: Plan = ctx.plan
        return grad.index_select(0, plan.order // plan.top_k), None


class _Sort(torch.autograd.Function):
    """[T * K, 1] -> [S, 1]: one value for each choice, into the order by expert."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return values.index_select(0, plan.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _in_order(grad, ctx.plan), None


def _summed(rows: Tensor, plan: Plan) -> Tensor:
    """Rows [S, d] of the choices that were sent, summed over each token's: [T, d]."""
    return _in_order(rows, plan).unflatten(0, (-1, plan.top_k)).sum(1)


def _in_order(rows: Tensor, plan: Plan) -> Tensor:
    """Rows [S, d] back in the router's order, zeros for what was not sent: [T * K, d]."""
    if len(plan.order) == len(plan.place):
        return rows.index_select(0, plan.place)
    return rows.new_zeros(len(plan.place), *rows.shape[1:]).index_copy_(0, plan.order, rows)
