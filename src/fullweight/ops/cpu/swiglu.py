"""Clamped SwiGLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.native import call


class SwiGlu(torch.autograd.Function):
    """Clamped SwiGLU of rows [..., 2f]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        return swiglu_rows(gate_up, None, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad, dgate_up = grad.contiguous(), torch.empty_like(gate_up)
        f = grad.shape[-1]
        sizes = (grad.numel() // f, f, float(ctx.limit), torch.get_num_threads())
        call("swiglu_backward", grad, gate_up, None, dgate_up, None, None, *sizes, dtype=grad.dtype)
        return dgate_up, None


def swiglu_rows(gate_up: Tensor, scale: Tensor | None, limit: float) -> Tensor:
    """scale[row] * swiglu(gate_up[row]); scale [rows] fp32 or None."""
    f = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], f)
    call(
        "swiglu_forward",
        gate_up,
        scale,
        out,
        out.numel() // f,
        f,
        float(limit),
        torch.get_num_threads(),
        dtype=out.dtype,
    )
    return out
