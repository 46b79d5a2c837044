"""RMSNorm, rotation and the clamped SwiGLU by torch_npu.

Sources: pages npu_rms_norm, npu_rotary_mul, npu_clipped_swiglu and npu_swiglu of torch_npu's own documentation
(`torch_npu/_op_plugin_docs.py`), aclnnRotaryPositionEmbedding of CANN's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RmsNorm(torch.autograd.Function):
    """weight * x / rms(x) over the last dim. The operator wants the weight in x's type; without one it is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out, inverse = torch.ops.npu.npu_rms_norm(x, _gamma(x, weight), eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx, dgamma = torch.ops.npu.npu_rms_norm_backward(grad.contiguous(), x, _gamma(x, weight), inverse)
        return dx, None if weight is None else dgamma.to(weight.dtype), None


def _gamma(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)


class Rotary(torch.autograd.Function):
    """Pairs (2i, 2i+1) of the trailing channels, in the table's precision. Rotating back is its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The operator rotates all channels of [1, T, heads, channels], by tables that repeat each pair's angle."""
    width = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, cos.dtype)
    part = x[..., -width:].reshape(1, x.shape[0], -1, width).to(wide)
    tables = (t.to(wide).repeat_interleave(2, -1).view(1, -1, 1, width) for t in (cos, sin))
    turned = torch.ops.npu.npu_rotary_mul(part, *tables, "interleave")
    return torch.cat((x[..., :-width], turned.view(*x.shape[:-1], width).to(x.dtype)), -1)


class SwiGlu(torch.autograd.Function):
    """silu(min(gate, limit)) * clamp(up, -limit, limit); keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        return swiglu(gate_up, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(grad.contiguous(), gate_up, ctx.limit), None


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """The operator's defaults are another model's: gate scaled by 1.702, up raised by 1, channels interleaved."""
    return torch.ops.npu.npu_clipped_swiglu(gate_up, alpha=1.0, limit=limit, bias=0.0, interleaved=False)


def swiglu_backward(grad: Tensor, gate_up: Tensor, limit: float) -> Tensor:
    """The clipped operator has no backward: that of the plain one at the clamped input, 0 where it clamps."""
    gate, up = gate_up.chunk(2, -1)
    clamped = torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), -1)
    inner = torch.ops.npu.npu_swiglu_backward(grad, clamped, -1)
    return inner.masked_fill(clamped != gate_up, 0.0)
