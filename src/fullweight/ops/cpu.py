"""Operations for CPUs: matrix products by torch (oneDNN), everything around them in fused kernels.

Each keeps the least that backward needs and casts fp32 master weights where they are used, so that no copy of
them outlives its product. What the kernels are not compiled for - float64, numbers of hyper-connection streams
other than 1, 2 and 4 - runs the reference operation of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.ops.cpu_attention import Attend, IndexLoss, gather_rows, select_entries
from fullweight.ops.native import (
    bound_prepared_products,
    call,
    give_back_freed_memory,
    keep_freed_memory,
    kernels,
)
from fullweight.ops.reference import AttentionOutput, Compressed, HyperOutput, ReferenceOperations

LOGITS = 1 << 22  # logits that exist at the same time
COMPILED_STREAMS = (1, 2, 4)
MOST_PAIRS = 512  # rotary pairs that the kernel's buffer holds


def _threads() -> int:
    return torch.get_num_threads()


def _compiled(*tensors: Tensor) -> bool:
    return all(t.dtype in (torch.float32, torch.bfloat16) for t in tensors)


class CpuOperations(ReferenceOperations):
    """Fused CPU operations; raises OperationError when they cannot be compiled here."""

    name = "cpu"

    def __init__(self) -> None:
        kernels()
        bound_prepared_products()
        keep_freed_memory()

    def end_phase(self) -> None:
        give_back_freed_memory()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return CastLinear.apply(x, weight)

    def wide_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return WideLinear.apply(x, weight)

    def grouped_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return GroupedLinear.apply(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return NormRotary.apply(x, weight, eps, None, None) if _compiled(x) else super().rms_norm(x, weight, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return NormRotary.apply(x, None, None, cos, sin) if _compiled(x, cos) else super().rotary(x, cos, sin)

    def norm_rotary(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        if not _compiled(x, cos):
            return super().norm_rotary(x, weight, eps, cos, sin)
        return NormRotary.apply(x, weight, eps, cos, sin)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return SwiGlu.apply(gate_up, limit) if _compiled(gate_up) else super().swiglu(gate_up, limit)

    def hyper_pre(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> HyperOutput:
        if streams.shape[1] not in COMPILED_STREAMS or not _compiled(streams, fn):
            return super().hyper_pre(streams, fn, base, scale, iters, eps, norm_eps)
        return HyperOutput(*HyperPre.apply(streams, fn, base, scale, iters, eps, norm_eps))

    def hyper_mix(self, streams: Tensor, pre: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (streams.requires_grad or pre.requires_grad)
        if needs_gradient or streams.shape[1] not in COMPILED_STREAMS or not _compiled(streams, pre):
            return super().hyper_mix(streams, pre)
        streams, (tokens, n, d) = streams.contiguous(), streams.shape
        x = streams.new_empty(tokens, d)
        call("hyper_mix", streams, pre, x, tokens, d, _threads(), n, dtype=streams.dtype)
        return x

    def hyper_post(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        if streams.shape[1] not in COMPILED_STREAMS or not _compiled(streams, post):
            return super().hyper_post(streams, y, post, comb)
        return HyperPost.apply(streams, y, post, comb)

    def hyper_head(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        if streams.shape[1] not in COMPILED_STREAMS or not _compiled(streams, fn):
            return super().hyper_head(streams, fn, base, scale, eps, norm_eps)
        return HyperHead.apply(streams, fn, base, scale, eps, norm_eps)

    def compress(
        self, values: Tensor, gates: Tensor, ape: Tensor, table: CompressionTable, overlap: bool
    ) -> Tensor:
        if values.dtype != torch.float32:
            return super().compress(values, gates, ape, table, overlap)
        return Compress.apply(values, gates, ape, table, overlap)

    def select_entries(
        self, queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int
    ) -> Tensor:
        if not _compiled(queries):
            return super().select_entries(queries, keys, weights, table, topk)
        return select_entries(queries, keys, weights, table, topk)

    def attention(
        self,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        layout: PackedLayout,
        window: int,
        turn: tuple[Tensor, Tensor],
        compressed: Compressed | None = None,
    ) -> AttentionOutput:
        if not _compiled(q):
            return super().attention(q, kv, sink, layout, window, turn, compressed)
        entries, table, selected = None, None, None
        if compressed is not None:
            entries, table, selected = compressed.entries, compressed.table, compressed.selected
        out, lse, mass = Attend.apply(q, kv, sink, entries, layout, window, turn, table, selected)
        return AttentionOutput(out, lse, mass if selected is not None else None)

    def indexer_loss(
        self, queries: Tensor, keys: Tensor, weights: Tensor, selected: Tensor, mass: Tensor, num_tokens: int
    ) -> Tensor:
        if not _compiled(queries):
            return super().indexer_loss(queries, keys, weights, selected, mass, num_tokens)
        return IndexLoss.apply(queries, keys, weights, selected, mass, num_tokens)

    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        if not _compiled(x):
            return super().experts(x, chosen, weights, gate_up, down, limit)
        return ExpertMixture.apply(x, chosen, weights, gate_up, down, limit)

    def cross_entropy(
        self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not _compiled(hidden):
            return super().cross_entropy(hidden, head, targets, weights)
        return CrossEntropy.apply(hidden, head, targets, weights)


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        dx = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, grad.T @ x.to(grad.dtype)


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        groups = x.shape[1]
        blocks, grad = weight.to(x.dtype).view(groups, -1, x.shape[2]), grad.view(x.shape[0], groups, -1)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        into = dweight.view(groups, -1, x.shape[2])
        for group, block in enumerate(blocks):
            dx[:, group] = grad[:, group] @ block
            into[group] = grad[:, group].T @ x[:, group]
        return dx, dweight


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
        assert ctx.sizes[-1] <= MOST_PAIRS, "the kernel turns a row's pairs in a buffer of fixed size"
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
            _threads(),
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
        dweight = torch.zeros(_threads(), ctx.sizes[1]) if weight is not None else None
        inputs = (grad, x, wide, cos, sin, rstd)
        call("norm_rotary_backward", *inputs, dx, dweight, *ctx.sizes, _threads(), dtype=grad.dtype)
        return dx, dweight.sum(0).to(weight.dtype) if dweight is not None else None, None, None, None


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
        sizes = (grad.numel() // f, f, float(ctx.limit), _threads())
        call("swiglu_backward", grad, gate_up, None, dgate_up, None, None, *sizes, dtype=grad.dtype)
        return dgate_up, None


def swiglu_rows(gate_up: Tensor, scale: Tensor | None, limit: float) -> Tensor:
    """scale[row] * swiglu(gate_up[row]); scale [rows] fp32 or None."""
    f = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], f)
    call("swiglu_forward", gate_up, scale, out, out.numel() // f, f, float(limit), _threads(), dtype=out.dtype)
    return out


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
        sizes = (tokens, d, iters, float(eps), float(norm_eps), _threads(), n)
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
        threads = _threads()
        dstreams = torch.empty_like(streams)
        dfn, dbase = torch.zeros(threads, *fn.shape), torch.zeros(threads, *base.shape)
        dscale = torch.zeros(threads, 3)
        saved = (streams, fn, base, scale, pre, logits, rstd)
        grads = (dx.contiguous(), dpost.contiguous(), dcomb.contiguous(), dstreams, dfn, dbase, dscale)
        sizes = (tokens, d, ctx.iters, float(ctx.eps), threads, n)
        call("hyper_pre_backward", *saved, *grads, *sizes, dtype=streams.dtype)
        return dstreams, dfn.sum(0), dbase.sum(0), dscale.sum(0), None, None, None


class HyperPost(torch.autograd.Function):
    """streams'[k] = post[k] y + sum_j comb[j, k] streams[j]."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
        tokens, n, d = streams.shape
        out = torch.empty_like(streams)
        call("hyper_post_forward", streams, y, post, comb, out, tokens, d, _threads(), n, dtype=streams.dtype)
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
        call("hyper_post_backward", *inputs, *results, tokens, d, _threads(), n, dtype=streams.dtype)
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
        sizes = (tokens, d, float(eps), float(norm_eps), _threads(), n)
        call("hyper_head_forward", streams, fn, base, scale, x, pre, logits, rstd, *sizes, dtype=streams.dtype)
        ctx.save_for_backward(streams, fn, base, scale, pre, logits, rstd)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, pre, logits, rstd = ctx.saved_tensors
        tokens, n, d = streams.shape
        threads = _threads()
        dstreams = torch.empty_like(streams)
        dfn, dbase = torch.zeros(threads, *fn.shape), torch.zeros(threads, *base.shape)
        dscale = torch.zeros(threads, 1)
        saved = (streams, fn, base, scale, pre, logits, rstd)
        grads = (dx.contiguous(), dstreams, dfn, dbase, dscale)
        call("hyper_head_backward", *saved, *grads, tokens, d, threads, n, dtype=streams.dtype)
        return dstreams, dfn.sum(0), dbase.sum(0), dscale.sum(0), None, None


class Compress(torch.autograd.Function):
    """Gated pooling of windows into entries [E, c], fp32."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, gates: Tensor, ape: Tensor, table: CompressionTable, overlap: bool
    ) -> Tensor:
        values, gates = values.contiguous(), gates.contiguous()
        ratio, width = ape.shape
        c = width // 2 if overlap else width
        ctx.sizes = (table.entry_tokens.shape[0], ratio, width, c)
        out = torch.empty(ctx.sizes[0], c)
        places = (table.entry_tokens, table.entry_positions)
        call("compress_forward", values, gates, ape, *places, out, *ctx.sizes, _threads())
        ctx.save_for_backward(values, gates, ape, *places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, gates, ape, first, position = ctx.saved_tensors
        dvalues, dgates = torch.zeros_like(values), torch.zeros_like(gates)
        dape = torch.zeros(_threads(), *ape.shape)
        inputs = (grad.contiguous(), values, gates, ape, first, position)
        call("compress_backward", *inputs, dvalues, dgates, dape, *ctx.sizes, _threads())
        return dvalues, dgates, dape.sum(0), None, None


class ExpertMixture(torch.autograd.Function):
    """Dropless experts: rows sorted by expert, one product per expert, sums back by token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        tokens, top_k = chosen.shape
        plan = DispatchPlan.of(chosen, gate_up.shape[0])
        scale = torch.zeros(plan.num_rows)
        scale[plan.place] = weights.detach().float().flatten()
        hidden = _by_expert(gather_rows(x, plan.token), gate_up, plan.counts, transpose=True)
        out_rows = _by_expert(swiglu_rows(hidden, scale, limit), down, plan.counts, transpose=True)
        ctx.save_for_backward(x, hidden, scale, gate_up, down)
        ctx.plan, ctx.limit, ctx.top_k, ctx.weights_dtype = plan, limit, top_k, weights.dtype
        return _combine(out_rows, plan.place, tokens, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, scale, gate_up, down = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        grad_rows = gather_rows(grad, plan.token)
        dactivation = _by_expert(grad_rows, down, plan.counts, transpose=False)
        dhidden, activation = torch.empty_like(hidden), torch.empty_like(dactivation)
        dscale = torch.empty_like(scale)
        rows, f = dactivation.shape
        sizes = (rows, f, float(ctx.limit), _threads())
        buffers = (dactivation, hidden, scale, dhidden, dscale, activation)
        call("swiglu_backward", *buffers, *sizes, dtype=x.dtype)
        ddown = _weight_gradient(grad_rows, activation, down, plan.counts)
        dgate_up = _weight_gradient(dhidden, gather_rows(x, plan.token), gate_up, plan.counts)
        drows = _by_expert(dhidden, gate_up, plan.counts, transpose=False)
        dx = _combine(drows, plan.place, x.shape[0], ctx.top_k)
        dweights = dscale[plan.place].view(-1, ctx.top_k).to(ctx.weights_dtype)
        return dx, None, dweights, dgate_up, ddown, None


@dataclass(frozen=True)
class DispatchPlan:
    """Rows sorted by expert, each expert's padded to a whole number of blocks.

    oneDNN prepares a product for its exact shape, at about the cost of running it once, and counts of tokens
    are different at every step: blocks leave few shapes to prepare. A padding row reads token 0, has weight 0
    and is read by no token. token [rows] int64 is the token that a row reads; place [T * K] the row of each
    choice; counts the rows of each expert.
    """

    num_rows: int
    token: Tensor
    place: Tensor
    counts: list[int]

    @staticmethod
    def of(chosen: Tensor, num_experts: int) -> DispatchPlan:
        flat = chosen.flatten()
        real = torch.bincount(flat, minlength=num_experts)
        block = torch.where(real > 512, 64, 32)
        padded = (real + block - 1) // block * block
        first_real, first = real.cumsum(0) - real, padded.cumsum(0) - padded
        order = torch.sort(flat, stable=True).indices
        row = torch.arange(flat.shape[0]) + (first - first_real)[flat[order]]
        place = torch.empty_like(order)
        place[order] = row
        counts = padded.tolist()
        token = torch.zeros(sum(counts), dtype=torch.int64)
        token[row] = order // chosen.shape[1]
        return DispatchPlan(len(token), token, place, counts)


def _by_expert(rows: Tensor, weight: Tensor, counts: list[int], transpose: bool) -> Tensor:
    """Each expert's rows times its matrix (transposed or not); weight [X, out, in]."""
    cast = weight.to(rows.dtype)
    out = rows.new_empty(rows.shape[0], weight.shape[1 if transpose else 2])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            matrix = cast[expert].T if transpose else cast[expert]
            torch.mm(rows[start : start + count], matrix, out=out[start : start + count])
        start += count
    return out


def _weight_gradient(left: Tensor, right: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Each expert's left^T right in weight's dtype; an expert without rows gets zeros."""
    out = torch.empty_like(weight)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            out[expert] = left[start : start + count].T @ right[start : start + count]
        else:
            out[expert].zero_()
        start += count
    return out


def _combine(rows: Tensor, place: Tensor, tokens: int, top_k: int) -> Tensor:
    out = rows.new_empty(tokens, rows.shape[1])
    call("combine", rows, place, out, tokens, top_k, rows.shape[1], _threads(), dtype=rows.dtype)
    return out


class CrossEntropy(torch.autograd.Function):
    """(sum of weighted losses, log_probs [T]); gradients are formed in forward, where the logits are."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.contiguous()
        total, vocabulary = hidden.shape[0], head.shape[0]
        needed = any(ctx.needs_input_grad[:2])
        cast, wide = head.detach().to(hidden.dtype), weights.detach().float().contiguous()
        log_probs = torch.empty(total)
        dhidden = torch.empty_like(hidden) if needed else None
        dhead = torch.zeros(head.shape) if needed else None
        size = max(LOGITS // vocabulary, 64)
        for a in range(0, total, size):
            b = min(a + size, total)
            logits = hidden[a:b] @ cast.T
            sizes = (b - a, vocabulary, int(needed), _threads())
            call("cross_entropy", logits, targets[a:b], wide[a:b], log_probs[a:b], *sizes, dtype=hidden.dtype)
            if dhidden is not None and dhead is not None:
                torch.mm(logits, cast, out=dhidden[a:b])
                dhead += logits.T @ hidden[a:b]
        if needed:
            ctx.save_for_backward(dhidden, dhead)
            ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(log_probs)
        return -(log_probs.double() * wide).sum().float(), log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _log_probs: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        return dhidden * grad, (dhead * grad).to(ctx.head_dtype), None, None
