"""Products with fp32 master weights, cast where they are used: no copy of a weight outlives its product.

Each can leave its weight's gradient for later (`late.py`): then the weight comes without graph, beside its `Late`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.late import Late

Multiply = Callable[[Tensor, Tensor], Tensor]


class CastLinear(torch.autograd.Function):
    """x @ weight^T in x's dtype; the cast weight is made again in backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, late: Late | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.late = late
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None

        def product() -> Tensor:
            return (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)

        return dx, formed(ctx, product), None


class WideLinear(torch.autograd.Function):
    """x @ weight^T in weight's dtype by `multiply`, which is or acts like F.linear; only the narrow x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, late: Late | None, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.late, ctx.multiply = late, multiply
        return multiply(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = ctx.multiply(grad, weight.T).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, formed(ctx, lambda: grad.T @ x.to(grad.dtype)), None, None


class GroupedLinear(torch.autograd.Function):
    """Block-diagonal projection of x [T, g, in] by weight [g * out, in]; one product per group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, late: Late | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.late = late
        blocks = weight.to(x.dtype).view(x.shape[1], -1, x.shape[2])
        out = x.new_empty(x.shape[0], blocks.shape[0], blocks.shape[1])
        for group, block in enumerate(blocks):
            out[:, group] = x[:, group] @ block.T
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        groups = x.shape[1]
        grad = grad.view(x.shape[0], groups, -1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx, blocks = torch.empty_like(x), weight.to(x.dtype).view(groups, -1, x.shape[2])
            for group, block in enumerate(blocks):
                dx[:, group] = grad[:, group] @ block

        def product() -> Tensor:
            dblocks = torch.empty_like(weight).view(groups, -1, x.shape[2])
            for group in range(groups):
                dblocks[group] = grad[:, group].T @ x[:, group]
            return dblocks.view_as(weight)

        return dx, formed(ctx, product), None


def formed(ctx: Any, product: Callable[[], Tensor]) -> Tensor | None:
    """The gradient of the second input, the weight: now where it is wanted now, otherwise None."""
    if ctx.late is not None:
        ctx.late.put(product)
        return None
    return product() if ctx.needs_input_grad[1] else None
