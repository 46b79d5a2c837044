"""Hyper-connections by torch_npu: npu_mhc_pre, npu_mhc_post and npu_mhc_sinkhorn, each with its backward.

The pages of torch_npu 2.13.0 have all three for the 950 alone. CANN's newest sources (ops-transformer,
mhc/*/docs) have pre and post for A2 and A3 as well, with 4 streams whose width is a multiple of 128; until a chip
has shown it, they are used only where a recipe names them. Sinkhorn's pages there (aclnnMhcSinkhorn and its
Backward) say that A2 and A3 lack it: it is used where the chip's name is a 950's, and stays in torch on a 910C.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STREAMS, WIDTH = (4,), 128
SINKHORN_CHIPS = "Ascend950"  # how their names begin


class HyperPre(torch.autograd.Function):
    """(input [T, d], post [T, n], logits [T, n, n] of comb before Sinkhorn, pre [T, n] without gradient)."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed, post, logits, inverse, products, pre = torch.ops.npu.npu_mhc_pre(
            streams, fn, scale, base, norm_eps=norm_eps, hc_eps=eps, out_flag=1
        )
        ctx.save_for_backward(streams, fn, scale, inverse, products, pre, post)
        ctx.eps = eps
        ctx.mark_non_differentiable(pre)
        return mixed, post, logits, pre

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dmixed: Tensor, dpost: Tensor, dlogits: Tensor, _pre: Tensor
    ) -> tuple[Tensor | None, ...]:
        streams, fn, scale, inverse, products, pre, post = ctx.saved_tensors
        dstreams, dfn, dscale, dbase, _ = torch.ops.npu.npu_mhc_pre_backward(
            streams, fn, scale, dmixed.contiguous(), dpost.contiguous(), dlogits.contiguous(),
            inverse, products, pre, post, hc_eps=ctx.eps,
        )  # fmt: skip
        return dstreams, dfn, dbase, dscale, None, None


class HyperPost(torch.autograd.Function):
    """streams'[k] = post[k] * y + sum_j comb[j, k] * streams[j]."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        return torch.ops.npu.npu_mhc_post(streams, comb, y, post)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams, y, post, comb = ctx.saved_tensors
        dstreams, dcomb, dy, dpost = torch.ops.npu.npu_mhc_post_backward(grad.contiguous(), streams, comb, y, post)
        return dstreams, dy, dpost, dcomb


class Sinkhorn(torch.autograd.Function):
    """Doubly stochastic matrices of logits [T, n, n]; keeps the logits, and makes each round's sums again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iters, ctx.eps = iters, eps
        comb, _, _ = torch.ops.npu.npu_mhc_sinkhorn(logits, eps=eps, num_iters=iters, out_flag=0)
        return comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        _, norms, sums = torch.ops.npu.npu_mhc_sinkhorn(logits, eps=ctx.eps, num_iters=ctx.iters, out_flag=1)
        return torch.ops.npu.npu_mhc_sinkhorn_backward(grad.contiguous(), norms, sums), None, None


@functools.cache
def register_shapes() -> None:
    """Say what the backward operators return: torch_npu does not, and a rehearsal has tensors without data."""

    def pre(x: Tensor, phi: Tensor, alpha: Tensor, *_: Any, gamma: Tensor | None = None, **__: Any) -> Any:
        bias = phi.new_empty(phi.shape[0])
        return tuple(map(torch.empty_like, (x, phi, alpha, bias, phi if gamma is None else gamma)))

    def post(grad: Tensor, x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Any:
        return tuple(map(torch.empty_like, (x, h_res, h_out, h_post)))

    def sinkhorn(grad: Tensor, norms: Tensor, sums: Tensor) -> Tensor:
        return torch.empty_like(grad)

    torch.library.register_fake("npu::npu_mhc_pre_backward", pre)
    torch.library.register_fake("npu::npu_mhc_sinkhorn_backward", sinkhorn)
    torch.library.register_fake("npu::npu_mhc_post_backward", post)
