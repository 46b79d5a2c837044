"""Products with fp32 master weights, cast where they are used: no copy of a weight outlives its product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class CastLinear(torch.autograd.Function):
    """x @ weight^T in x's dtype; the cast weight is made again in backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return dx, dweight


class WideLinear(torch.autograd.Function):
    """x @ weight^T in weight's dtype; only the narrow x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, grad.T @ x.to(grad.dtype) if ctx.needs_input_grad[1] else None


class GroupedLinear(torch.autograd.Function):
    """Block-diagonal projection of x [T, g, in] by weight [g * out, in]; one product per group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        blocks = weight.to(x.dtype).view(x.shape[1], -1, x.shape[2])
        out = x.new_empty(x.shape[0], blocks.shape[0], blocks.shape[1])
        for group, block in enumerate(blocks):
            out[:, group] = x[:, group] @ block.T
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        groups = x.shape[1]
        blocks, grad = weight.to(x.dtype).view(groups, -1, x.shape[2]), grad.view(x.shape[0], groups, -1)
        dx = torch.empty_like(x) if wants_x else None
        dblocks = torch.empty_like(weight).view(groups, -1, x.shape[2]) if wants_weight else None
        for group, block in enumerate(blocks):
            if dx is not None:
                dx[:, group] = grad[:, group] @ block
            if dblocks is not None:
                dblocks[group] = grad[:, group].T @ x[:, group]
        return dx, dblocks.view_as(weight) if dblocks is not None else None
