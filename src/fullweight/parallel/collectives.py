"""Exchanges of rows between ranks that autograd sees through: gather, summing scatter, rows from a neighbour, and
any number of rows from each rank to each.

Each is the other's backward: rows gathered from all ranks get back the sum of all ranks' gradients, a sum that was
scattered sends its gradient to all. Sums travel as they are and are added in fp32, in rank order, on the rank that
keeps them: the bytes of a reduce-scatter, without its rounding at every hop, and the same bits every time.
Every function is collective: all ranks of the group call it alike, in forward and in backward.

Left out: overlap with computation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def gather_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' `rows` [s, ...], of equal shape, in rank order: [n * s, ...]."""
    return _Gather.apply(rows, group)


def scatter_sum(rows: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part [s, ...] of the sum over ranks of `rows` [n * s, ...]."""
    return _ScatterSum.apply(rows, group)


def rows_before(rows: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """The last `count` rows of the previous rank's `rows` [s, w] (count <= s); zeros on the first rank."""
    return _RowsBefore.apply(rows, count, group)


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """`rows` [R, ...], `sent` of them to each rank in order, for `received` rows from each: [R', ...]."""
    return _Exchange.apply(rows, sent, received, group)


@torch.no_grad()
def heads_to_rows(part: Tensor, group: ProcessGroup) -> Tensor:
    """[n * s, h, ...] of each rank's own heads to [s, n * h, ...] of all heads on each rank's own rows."""
    size = dist.get_world_size(group)
    received = torch.empty_like(part, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, part.contiguous(), group=group)
    return received.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def sum_over(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of `values` over ranks, a new tensor."""
    result = values.detach().clone()
    dist.all_reduce(result, group=group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class _RowsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, group: ProcessGroup) -> Tensor:
        assert count <= rows.shape[0], "a slice reaches one slice back, no further"
        ctx.group, ctx.shape = group, rows.shape
        return _passed_on(rows[rows.shape[0] - count :], 1, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.shape[0] - grad.shape[0] :] = _passed_on(grad, -1, ctx.group)
        return whole, None, None


def _gathered(rows: Tensor, group: ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    out = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _summed(rows: Tensor, group: ProcessGroup) -> Tensor:
    parts = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, rows.contiguous(), group=group)
    parts = parts.unflatten(0, (dist.get_world_size(group), -1))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return parts.sum(0, dtype=wide).to(rows.dtype)


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _passed_on(rows: Tensor, step: int, group: ProcessGroup) -> Tensor:
    """What the rank `step` before this one passed on; zeros where there is none."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sent, received = [0] * size, [0] * size
    if 0 <= rank + step < size:
        sent[rank + step] = rows.shape[0]
    if 0 <= rank - step < size:
        received[rank - step] = rows.shape[0]
    out = rows.new_zeros(rows.shape)
    dist.all_to_all_single(out[: sum(received)], rows[: sum(sent)].contiguous(), received, sent, group=group)
    return out
