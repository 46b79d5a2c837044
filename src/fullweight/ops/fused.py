"""Norms, rotation, SwiGLU and what a sublayer takes from the streams and gives to them, as formulas.

`torch.compile` makes one kernel of each.

Forward and backward are plain functions without autograd, so that one compiled kernel serves the forward pass and
the same pass made again in backward: equal bits. What is narrow is widened once and rounded once, where the
reference rounds between norm and rotation. Below `MANY` elements, and on a CPU, the formulas run as they are: each
kind of arguments takes seconds to compile, which a small model never earns back (docs/nvidia.md). `HyperLogits` is
not compiled, and Sinkhorn's rounds stay the reference's: the compiler made them only a seventh faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MANY = 2**22  # elements

Result = Tensor | tuple[Tensor, ...]


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the arguments, compiled where that pays; the first is a tensor whose size counts."""
    first = arguments[0]
    if type(first) is not Tensor or first.device.type == "cpu" or first.numel() < MANY:
        return function(*arguments)
    kind = tuple((a.dtype, a.shape[1:]) if isinstance(a, Tensor) else a for a in arguments)
    return _compiled(function, kind)(*arguments)


@functools.cache
def _compiled(function: FunctionType, kind: tuple[Any, ...]) -> Callable[..., Any]:
    """One for each kind of arguments; a copy of the code, because the compiler limits the variants of a code."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wide x [T, M, c] with its last pairs turned; cos, sin [T, R]."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    plain, turned = x[..., : -2 * pairs], x[..., -2 * pairs :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((plain, turned), -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, M, c] rotated."""
    return _rotated(_wide(x), cos, sin).to(x.dtype)


def norm(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x [T, M, c] normalised, scaled and rotated."""
    y = _wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if cos is not None and sin is not None:
        y = _rotated(y, cos, sin)
    return y.to(x.dtype)


def norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
) -> Result:
    """Gradient of `norm` for x and, where there is a weight, for it."""
    y, given = _wide(x), _wide(grad)
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * inverse
    if cos is not None and sin is not None:
        given = _rotated(given, cos, -sin)
    scaled = given if weight is None else given * weight
    dx = (inverse * (scaled - y * (scaled * y).mean(-1, keepdim=True))).to(x.dtype)
    return dx if weight is None else (dx, (given * y).sum((0, 1)).to(weight.dtype))


def _rows(x: Tensor) -> Tensor:
    """[T, ..., c] as [T, M, c]."""
    return x.contiguous().view(x.shape[0], x[:1].numel() // x.shape[-1] if x.shape[0] else 1, x.shape[-1])


class NormRotary(torch.autograd.Function):
    """RMSNorm of [T, ..., c], then rotation where there are tables; keeps its input alone, as it came: only so is
    it known for a tensor that can be made again (`recompute.py`)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        out: Tensor = run(norm, _rows(x), weight, eps, cos, sin)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        found = run(norm_backward, _rows(x), _rows(grad), weight, ctx.eps, cos, sin)
        dx, dweight = (found, None) if weight is None else found
        return dx.view(x.shape), dweight, None, None, None


class Rotary(torch.autograd.Function):
    """Rotation of [T, ..., c]; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out: Tensor = run(turn, _rows(x), cos, sin)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return run(turn, _rows(grad), cos, -sin).view(grad.shape), None, None


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """[N, 2f] -> [N, f], as `ReferenceOperations.swiglu`."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, grad: Tensor, limit: float) -> Tensor:
    """Gradient of `swiglu`; 0 where it clamps."""
    gate, up = _wide(gate_up).chunk(2, -1)
    given, low = _wide(grad), gate.clamp(max=limit)
    share = torch.sigmoid(low)
    dgate = given * up.clamp(-limit, limit) * share * (1 + low * (1 - share)) * (gate <= limit)
    dup = given * low * share * (up.abs() <= limit)
    return torch.cat((dgate, dup), -1).to(gate_up.dtype)


class SwiGlu(torch.autograd.Function):
    """Over rows [N, 2f]; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        out: Tensor = run(swiglu, gate_up, limit)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return run(swiglu_backward, gate_up, grad.contiguous(), ctx.limit), None


def post(streams: Tensor, y: Tensor, weights: Tensor, comb: Tensor) -> Tensor:
    """streams'[k] = weights[k] * y + sum_j comb[j, k] * streams[j], as `ReferenceOperations.hyper_post`."""
    mixed = (comb.unsqueeze(-1) * streams.to(comb.dtype).unsqueeze(2)).sum(1)
    return (mixed + weights.unsqueeze(-1) * y.to(comb.dtype).unsqueeze(1)).to(streams.dtype)


def post_backward(streams: Tensor, grad: Tensor, y: Tensor, weights: Tensor, comb: Tensor) -> Result:
    """Gradients of `post` for its four inputs."""
    given, wide = grad.to(comb.dtype), streams.to(comb.dtype)
    dstreams = (comb.unsqueeze(-1) * given.unsqueeze(1)).sum(2)
    dy = (weights.unsqueeze(-1) * given).sum(1)
    dweights = (given * y.to(comb.dtype).unsqueeze(1)).sum(-1)
    dcomb = (wide.unsqueeze(2) * given.unsqueeze(1)).sum(-1)
    return dstreams.to(streams.dtype), dy.to(y.dtype), dweights, dcomb


class HyperPost(torch.autograd.Function):
    """What a sublayer gives to the streams."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, weights: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, weights, comb)
        out: Tensor = run(post, streams, y, weights, comb)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        streams, y, weights, comb = ctx.saved_tensors
        found: tuple[Tensor, ...] = run(post_backward, streams, grad.contiguous(), y, weights, comb)
        return found


class HyperLogits(torch.autograd.Function):
    """fn @ flat / rms(flat) for streams [T, n, d] and wide fn [k, n*d]; keeps the streams narrow, as they came."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, fn: Tensor, eps: float) -> Tensor:
        flat = streams.flatten(1).to(fn.dtype)
        inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
        out = F.linear(flat, fn) * inverse
        ctx.save_for_backward(streams, fn, inverse, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        streams, fn, inverse, out = ctx.saved_tensors
        flat, scaled = streams.flatten(1).to(fn.dtype), grad * inverse
        shrink = inverse.square() * (grad * out).sum(-1, keepdim=True) / flat.shape[-1]
        dflat = torch.addcmul(scaled @ fn, flat, shrink, value=-1)
        return dflat.to(streams.dtype).view(streams.shape), scaled.T @ flat, None


def mix(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_i pre[i] * streams[i], as `ReferenceOperations.hyper_mix`."""
    return (pre.unsqueeze(-1) * streams.to(pre.dtype)).sum(1).to(streams.dtype)


def mix_backward(streams: Tensor, grad: Tensor, pre: Tensor) -> Result:
    """Gradients of `mix` for both inputs."""
    given = grad.to(pre.dtype).unsqueeze(1)
    return (pre.unsqueeze(-1) * given).to(streams.dtype), (given * streams.to(pre.dtype)).sum(-1)


class HyperMix(torch.autograd.Function):
    """What a sublayer takes from the streams; keeps them narrow."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(streams, pre)
        out: Tensor = run(mix, streams, pre)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        streams, pre = ctx.saved_tensors
        found: tuple[Tensor, ...] = run(mix_backward, streams, grad.contiguous(), pre)
        return found
