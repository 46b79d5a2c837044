"""Attention over window and entries: block products in torch, the softmax in a fused kernel.

Queries go in chunks. A chunk's window scores are one batched product of blocks of `BLOCK` queries (all heads
together: there is one key head) with the window-plus-block keys before them; its entries' scores are one
product with a contiguous slice (HCA) or with gathered entries (CSA). Nothing but the output and the
log-sum-exp is kept: backward forms the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.ops.cpu.rows import add_rows, gather_rows
from fullweight.ops.cpu.sizes import sizes
from fullweight.ops.native import call
from fullweight.ops.reference import Compressed

BLOCK = 32  # queries that share one window product
CHUNK = 256  # fewest queries to a chunk, unless the row is shorter
SCORES = 1 << 20  # scores that exist at the same time, when that allows a larger chunk


@dataclass(frozen=True)
class Geometry:
    """Visible ranges (int32, one per padded query) in the coordinates of the chunked products."""

    padded: int  # queries rounded up to a multiple of BLOCK
    before: int  # keys before a block's first query, a multiple of BLOCK
    window_low: Tensor
    window_high: Tensor
    entry_low: Tensor | None
    entry_high: Tensor | None

    @staticmethod
    def of(layout: PackedLayout, window: int, compressed: Compressed | None) -> Geometry:
        total = layout.num_tokens
        padded = -(-total // BLOCK) * BLOCK
        before = -(-window // BLOCK) * BLOCK
        token = torch.arange(total)
        start = token - token % BLOCK - before
        low = torch.maximum(layout.document_starts, token - window + 1) - start
        high = token + 1 - start
        entry_low = entry_high = None
        if compressed is not None and compressed.selected is not None:
            entry_high = _padded((compressed.selected >= 0).sum(1), padded)
            entry_low = torch.zeros_like(entry_high)
        elif compressed is not None:
            entry_low = _padded(compressed.table.entry_begin, padded)
            entry_high = _padded(compressed.table.entry_end, padded)
        return Geometry(padded, before, _padded(low, padded), _padded(high, padded), entry_low, entry_high)


def _padded(values: Tensor, size: int) -> Tensor:
    return F.pad(values.to(torch.int32), (0, size - values.shape[0]))


@dataclass
class Chunk:
    """One chunk's queries, its window blocks of keys, and its entries with their ranges."""

    start: int
    stop: int
    q: Tensor  # [Q, H, c]
    keys: Tensor  # [blocks, before + BLOCK, c], blocks overlap
    entries: Tensor | None  # [e, c] shared by the chunk's queries, or [Q, k, c]
    first_entry: int
    low: Tensor | None
    high: Tensor | None

    def window_scores(self, left: Tensor) -> Tensor:
        """left [Q, H, c] against the window keys: [Q, H, before + BLOCK]."""
        blocks = left.reshape(self.keys.shape[0], -1, left.shape[-1])
        return torch.bmm(blocks, self.keys.transpose(1, 2)).view(*left.shape[:2], -1)

    def entry_scores(self, left: Tensor) -> Tensor | None:
        """left [Q, H, c] against the entries: [Q, H, e or k]."""
        if self.entries is None:
            return None
        if self.entries.dim() == 3:
            return torch.bmm(left, self.entries.transpose(1, 2))
        return (left.flatten(0, 1) @ self.entries.T).view(*left.shape[:2], -1)

    def weighted(self, window: Tensor, entry: Tensor | None) -> Tensor:
        """Weights over window keys and entries times the keys: [Q, H, c]."""
        blocks = window.view(self.keys.shape[0], -1, window.shape[-1])
        out = torch.bmm(blocks, self.keys).view(*window.shape[:2], -1)
        if entry is None or self.entries is None:
            return out
        if self.entries.dim() == 3:
            return out.baddbmm_(entry, self.entries)
        out.flatten(0, 1).addmm_(entry.flatten(0, 1), self.entries)
        return out


def chunked(q: Tensor, kv: Tensor, geometry: Geometry, compressed: Compressed | None) -> Iterator[Chunk]:
    """The chunks of padded q [P, H, c] over padded kv [before + P, c]."""
    width = geometry.before + BLOCK
    size = _chunk_size(q.shape[1], width, compressed)
    for a in range(0, geometry.padded, size):
        b = min(a + size, geometry.padded)
        shape, stride = ((b - a) // BLOCK, width, kv.shape[1]), (BLOCK * kv.shape[1], kv.shape[1], 1)
        # products would each make their own copy of overlapping blocks
        keys = kv.as_strided(shape, stride, a * kv.shape[1]).contiguous()
        entries, first, low, high = None, 0, None, None
        if compressed is not None:
            assert geometry.entry_low is not None
            assert geometry.entry_high is not None
            low, high = geometry.entry_low[a:b], geometry.entry_high[a:b]
            if compressed.selected is not None:
                index = _selected_rows(compressed.selected, a, b)
                entries = gather_rows(compressed.entries, index)
            else:
                first, last = entry_span(compressed.table, a, b, compressed.entries.shape[0])
                entries = compressed.entries[first:last]
                low, high = (low - first).clamp_(min=0), (high - first).clamp_(min=0)
            if entries.shape[-2] == 0:
                entries = None
        yield Chunk(a, b, q[a:b], keys, entries, first, low, high)


def _chunk_size(heads: int, width: int, compressed: Compressed | None) -> int:
    """Queries per chunk, a multiple of BLOCK: enough arithmetic per call, scores that stay in cache."""
    if compressed is not None and compressed.selected is not None:
        width += compressed.selected.shape[1]
    return max(CHUNK, SCORES // (heads * width) // BLOCK * BLOCK)


def entry_span(table: CompressionTable, a: int, b: int, num_entries: int) -> tuple[int, int]:
    """Entries, of `num_entries`, that any token of [a, b) sees: one range, whose bounds grow with the token.

    Its length is rounded up where there are entries: oneDNN prepares every shape of a product anew.
    """
    first, end = sizes().entries(table, a, b)
    step = 64 if end - first > 256 else 16
    return first, min(first + -(-(end - first) // step) * step, num_entries)


def _selected_rows(selected: Tensor, a: int, b: int) -> Tensor:
    rows = selected[a:b]
    missing = b - a - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing), value=-1) if missing else rows


class Attend(torch.autograd.Function):
    """(out [T, H, c] rotated back by `turn`, lse [T, H], mass [T, k] or empty)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        entries: Tensor | None,
        layout: PackedLayout,
        window: int,
        turn: tuple[Tensor, Tensor],
        table: CompressionTable | None,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compressed = _compressed(entries, table, selected)
        geometry = Geometry.of(layout, window, compressed)
        total, heads, width = q.shape
        front = kv.shape[0] - total
        q_padded, kv_padded = _pad_rows(q, 0, geometry.padded), _pad_keys(kv, front, geometry)
        out = torch.empty_like(q_padded)
        lse = torch.empty(geometry.padded, heads)
        num_selected = selected.shape[1] if selected is not None else 0
        mass = torch.zeros(geometry.padded, num_selected)
        sink_wide = sink.detach().float().contiguous()
        for chunk in chunked(q_padded, kv_padded, geometry, compressed):
            a, b = chunk.start, chunk.stop
            in_window, in_entries = chunk.window_scores(chunk.q), chunk.entry_scores(chunk.q)
            call(
                "softmax_forward",
                in_window,
                in_window.shape[-1],
                geometry.window_low[a:b],
                geometry.window_high[a:b],
                in_entries,
                in_entries.shape[-1] if in_entries is not None else 0,
                chunk.low,
                chunk.high,
                sink_wide,
                lse[a:b],
                mass[a:b] if num_selected and in_entries is not None else None,
                b - a,
                heads,
                float(width**-0.5),
                torch.get_num_threads(),
                dtype=q.dtype,
            )
            out[a:b] = chunk.weighted(in_window, in_entries)
        cos, sin = turn
        out, lse = out[:total], lse[:total]
        _rotate(out, cos, -sin, into=out)
        ctx.save_for_backward(q, kv, sink, entries, selected, out, lse, cos, sin)
        ctx.layout, ctx.window, ctx.table = layout, window, table
        result = out, lse, mass[:total]
        ctx.mark_non_differentiable(result[1], result[2])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _lse: Tensor, _mass: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, entries, selected, out, lse, cos, sin = ctx.saved_tensors
        compressed = _compressed(entries, ctx.table, selected)
        geometry = Geometry.of(ctx.layout, ctx.window, compressed)
        total, heads, width = q.shape
        threads = torch.get_num_threads()
        front = kv.shape[0] - total
        q_padded, kv_padded = _pad_rows(q, 0, geometry.padded), _pad_keys(kv, front, geometry)
        grad = grad.contiguous()
        # a rotation leaves the product of gradient and output as it is
        delta = torch.empty(total, heads)
        call("row_dot", grad, out, delta, delta.numel(), width, threads, dtype=q.dtype)
        grad_padded = _pad_rows(_rotate(grad, cos, sin, into=torch.empty_like(grad)), 0, geometry.padded)
        delta, lse = _pad_rows(delta, 0, geometry.padded), _pad_rows(lse, 0, geometry.padded)
        dq = torch.empty_like(q_padded)
        dkv = torch.zeros(geometry.before + geometry.padded, kv.shape[1])
        dentries = torch.zeros(entries.shape) if entries is not None else None
        for chunk in chunked(q_padded, kv_padded, geometry, compressed):
            a, b = chunk.start, chunk.stop
            do = grad_padded[a:b]
            common = (lse[a:b], delta[a:b], b - a, heads, float(width**-0.5), threads)
            probs, dscores = chunk.window_scores(chunk.q), chunk.window_scores(do)
            low, high = geometry.window_low[a:b], geometry.window_high[a:b]
            call("softmax_backward", probs, dscores, probs.shape[-1], low, high, *common, dtype=q.dtype)
            _add_window(dkv, chunk, dscores, probs, do, geometry.before)
            entry_probs, entry_dscores = chunk.entry_scores(chunk.q), chunk.entry_scores(do)
            if entry_probs is not None and entry_dscores is not None and dentries is not None:
                ranges = (entry_probs.shape[-1], chunk.low, chunk.high)
                call("softmax_backward", entry_probs, entry_dscores, *ranges, *common, dtype=q.dtype)
                _add_entries(dentries, chunk, entry_dscores, entry_probs, do, selected)
            dq[a:b] = chunk.weighted(dscores, entry_dscores)
        dsink = -(torch.exp(sink.float() - lse[:total]) * delta[:total]).sum(0).to(sink.dtype)
        dkv = dkv[geometry.before - front : geometry.before + total].to(kv.dtype)
        dentries = dentries.to(entries.dtype) if dentries is not None else None
        return dq[:total], dkv, dsink, dentries, None, None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> Tensor:
    """Rotate the trailing channels of x [T, H, c]; `into` may be x."""
    sizes = (x.numel() // x.shape[-1], x.shape[-1], x.shape[1], cos.shape[-1], 0.0, torch.get_num_threads())
    call("norm_rotary_forward", x, None, cos.contiguous(), sin.contiguous(), into, None, *sizes, dtype=x.dtype)
    return into


def _compressed(
    entries: Tensor | None, table: CompressionTable | None, selected: Tensor | None
) -> Compressed | None:
    return None if entries is None or table is None else Compressed(entries, table, selected)


def _pad_rows(x: Tensor, before: int, rows: int) -> Tensor:
    after = rows - x.shape[0]
    if not before and not after:
        return x.contiguous()
    return F.pad(x, (0, 0) * (x.dim() - 1) + (before, after))


def _pad_keys(kv: Tensor, front: int, geometry: Geometry) -> Tensor:
    """kv, `front` rows of which lie before the first query, as [before + P, c]."""
    assert 0 <= front <= geometry.before, "rows in front of the first query are within its window"
    return _pad_rows(kv, geometry.before - front, front + geometry.padded)


def _add_window(dkv: Tensor, chunk: Chunk, dscores: Tensor, probs: Tensor, do: Tensor, before: int) -> None:
    """Fold the gradients of overlapping window keys into dkv [before + P, c]."""
    blocks = chunk.keys.shape[0]
    ds, p = dscores.view(blocks, -1, dscores.shape[-1]), probs.view(blocks, -1, probs.shape[-1])
    width = do.shape[-1]
    dkeys = torch.bmm(ds.transpose(1, 2), chunk.q.reshape(blocks, -1, width))
    dkeys = dkeys.baddbmm_(p.transpose(1, 2), do.reshape(blocks, -1, width)).view(blocks, -1, BLOCK, width)
    into = dkv.view(-1, BLOCK, width)
    first = chunk.start // BLOCK
    for step in range(dkeys.shape[1]):
        into[first + step : first + step + blocks] += dkeys[:, step]


def _add_entries(
    dentries: Tensor, chunk: Chunk, dscores: Tensor, probs: Tensor, do: Tensor, selected: Tensor | None
) -> None:
    if selected is None:
        span = slice(chunk.first_entry, chunk.first_entry + dscores.shape[-1])
        grads = dscores.flatten(0, 1).T @ chunk.q.flatten(0, 1)
        dentries[span] += grads.addmm_(probs.flatten(0, 1).T, do.flatten(0, 1))
        return
    rows = torch.bmm(dscores.transpose(1, 2), chunk.q).baddbmm_(probs.transpose(1, 2), do)
    add_rows(dentries, _selected_rows(selected, chunk.start, chunk.stop), rows)
