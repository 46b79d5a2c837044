"""Hyper-connections by torch_npu: npu_mhc_pre and npu_mhc_post, each with its backward.

The Sinkhorn rounds stay in torch: CANN has npu_mhc_sinkhorn for the 950 alone. The pages of torch_npu 2.13.0
say the same of pre and post; CANN's newest sources (ops-transformer, mhc/*/docs) have these two for A2 and A3
as well, with 4 streams whose width is a multiple of 128. Until a chip has shown it, they are used only where a
recipe names them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STREAMS, WIDTH = (4,), 128


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


@functools.cache
def register_shapes() -> None:
    """Say what the two backward operators return: torch_npu does not, and a rehearsal has tensors without data."""

    def pre(x: Tensor, phi: Tensor, alpha: Tensor, *_: Any, gamma: Tensor | None = None, **__: Any) -> Any:
        bias = phi.new_empty(phi.shape[0])
        return tuple(map(torch.empty_like, (x, phi, alpha, bias, phi if gamma is None else gamma)))

    def post(grad: Tensor, x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Any:
        return tuple(map(torch.empty_like, (x, h_res, h_out, h_post)))

    torch.library.register_fake("npu::npu_mhc_pre_backward", pre)
    torch.library.register_fake("npu::npu_mhc_post_backward", post)
