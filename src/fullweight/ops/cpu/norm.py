"""RMSNorm and rotary embedding in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.native import call


class NormRotary(torch.autograd.Function):
    """RMSNorm (eps not None), then rotation (cos not None), over rows of the last dim."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float | None, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        dim = x.shape[-1]
        rows = x.numel() // dim
        out = torch.empty_like(x)
        rstd = torch.empty(rows) if eps is not None else None
        ctx.sizes = (
            rows,
            dim,
            rows // x.shape[0] if x.shape[0] else 1,
            cos.shape[-1] if cos is not None else 0,
        )
        wide = weight.detach().float().contiguous() if weight is not None else None
        tables = (wide, cos, sin)
        call(
            "norm_rotary_forward",
            x,
            *tables,
            out,
            rstd,
            *ctx.sizes,
            float(eps or 0),
            torch.get_num_threads(),
            dtype=x.dtype,
        )
        ctx.save_for_backward(x if eps is not None else None, weight, cos, sin, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(grad)
        wide = weight.detach().float().contiguous() if weight is not None else None
        dweight = torch.zeros(torch.get_num_threads(), ctx.sizes[1]) if weight is not None else None
        inputs = (grad, x, wide, cos, sin, rstd)
        call("norm_rotary_backward", *inputs, dx, dweight, *ctx.sizes, torch.get_num_threads(), dtype=grad.dtype)
        return dx, dweight.sum(0).to(weight.dtype) if dweight is not None else None, None, None, None
