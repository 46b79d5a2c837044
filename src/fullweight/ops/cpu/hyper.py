"""Hyper-connections: one pass forward and one backward for each side of a sublayer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.native import call

COMPILED_STREAMS = (1, 2, 4)
LANES = 16  # widths of streams are multiples of it


class HyperPre(torch.autograd.Function):
    """(input [T, d], post [T, n], comb [T, n, n], pre [T, n])."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams = streams.contiguous()
        tokens, n, d = streams.shape
        x = streams.new_empty(tokens, d)
        post, comb, pre = torch.empty(tokens, n), torch.empty(tokens, n, n), torch.empty(tokens, n)
        logits, rstd = torch.empty(tokens, fn.shape[0]), torch.empty(tokens)
        sizes = (tokens, d, iters, float(eps), float(norm_eps), torch.get_num_threads(), n)
        results = (x, post, comb, pre, logits, rstd)
        call("hyper_pre_forward", streams, fn, base, scale, *results, *sizes, dtype=streams.dtype)
        ctx.save_for_backward(streams, fn, base, scale, pre, logits, rstd)
        ctx.iters, ctx.eps = iters, eps
        ctx.mark_non_differentiable(pre)
        return x, post, comb, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dpost: Tensor, dcomb: Tensor, _dpre: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, pre, logits, rstd = ctx.saved_tensors
        tokens, n, d = streams.shape
        threads = torch.get_num_threads()
        dstreams = torch.empty_like(streams)
        dfn, dbase = torch.zeros(threads, *fn.shape), torch.zeros(threads, *base.shape)
        dscale = torch.zeros(threads, 3)
        saved = (streams, fn, base, scale, pre, logits, rstd)
        grads = (dx.contiguous(), dpost.contiguous(), dcomb.contiguous(), dstreams, dfn, dbase, dscale)
        sizes = (tokens, d, ctx.iters, float(ctx.eps), threads, n)
        call("hyper_pre_backward", *saved, *grads, *sizes, dtype=streams.dtype)
        return dstreams, dfn.sum(0), dbase.sum(0), dscale.sum(0), None, None, None


def mix_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """HyperPre's input again, the same bits: streams [T, n, d], pre [T, n] -> [T, d]."""
    streams, (tokens, n, d) = streams.contiguous(), streams.shape
    x = streams.new_empty(tokens, d)
    call("hyper_mix", streams, pre, x, tokens, d, torch.get_num_threads(), n, dtype=streams.dtype)
    return x


class HyperPost(torch.autograd.Function):
    """streams'[k] = post[k] y + sum_j comb[j, k] streams[j]."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
        tokens, n, d = streams.shape
        out = torch.empty_like(streams)
        call(
            "hyper_post_forward",
            streams,
            y,
            post,
            comb,
            out,
            tokens,
            d,
            torch.get_num_threads(),
            n,
            dtype=streams.dtype,
        )
        ctx.save_for_backward(streams, y, post, comb)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        tokens, n, d = streams.shape
        results = (
            torch.empty_like(streams),
            torch.empty_like(y),
            torch.empty_like(post),
            torch.empty_like(comb),
        )
        inputs = (grad.contiguous(), streams, y, post, comb)
        call("hyper_post_backward", *inputs, *results, tokens, d, torch.get_num_threads(), n, dtype=streams.dtype)
        return results


class HyperHead(torch.autograd.Function):
    """Streams [T, n, d] to [T, d]."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        streams = streams.contiguous()
        tokens, n, d = streams.shape
        x, pre = streams.new_empty(tokens, d), torch.empty(tokens, n)
        logits, rstd = torch.empty(tokens, n), torch.empty(tokens)
        sizes = (tokens, d, float(eps), float(norm_eps), torch.get_num_threads(), n)
        call("hyper_head_forward", streams, fn, base, scale, x, pre, logits, rstd, *sizes, dtype=streams.dtype)
        ctx.save_for_backward(streams, fn, base, scale, pre, logits, rstd)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, pre, logits, rstd = ctx.saved_tensors
        tokens, n, d = streams.shape
        threads = torch.get_num_threads()
        dstreams = torch.empty_like(streams)
        dfn, dbase = torch.zeros(threads, *fn.shape), torch.zeros(threads, *base.shape)
        dscale = torch.zeros(threads, 1)
        saved = (streams, fn, base, scale, pre, logits, rstd)
        grads = (dx.contiguous(), dstreams, dfn, dbase, dscale)
        call("hyper_head_backward", *saved, *grads, tokens, d, threads, n, dtype=streams.dtype)
        return dstreams, dfn.sum(0), dbase.sum(0), dscale.sum(0), None, None
