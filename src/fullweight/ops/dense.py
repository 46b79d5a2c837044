"""Attention and the indexer's loss as dense products over blocks of queries: nothing is gathered by index.

A block of queries and the tokens of its windows are one product for all heads, since they share one key-value
head; the entries are another, of which masks hide what a query does not see. That computes more scores than there
are pairs (a window twice over; every entry of the row for each query), in products of a size that a GPU is made
for. The reference, which gathers each query's keys, computes no score too many, but the gradient of a gather is a
sum into rows by index: on one GPU that took over nine tenths of the step at the widths of Flash (docs/nvidia.md).
Here every sum is a product or an addition of neighbours, so the result repeats bit for bit.

Scores are rounded to the inputs' type as in the reference; softmax and its gradient are fp32. Backward makes
scores again from the statistics, chunk by chunk, so memory is linear in tokens. Left out: skipping blocks that a
mask hides altogether, which would pay for rows of many documents.
Source: report section 2.3; the gradient through statistics is that of Flash attention (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import PackedLayout
from fullweight.ops.reference import Compressed, ReferenceOperations, chunks, kl_divergence, recomputed

BLOCK = 128  # queries whose windows are one product
MOST_SCORES = 2**26  # that exist at the same time


@dataclass(frozen=True)
class Sight:
    """What each query sees; tensors that are there anyway: [T] or [T, k] int64."""

    starts: Tensor
    window: int
    front: int  # rows of the keys before the first query's own
    begin: Tensor | None = None
    end: Tensor | None = None
    selected: Tensor | None = None

    @staticmethod
    def of(q: Tensor, kv: Tensor, layout: PackedLayout, window: int, compressed: Compressed | None) -> Sight:
        front = kv.shape[0] - q.shape[0]
        if compressed is None:
            return Sight(layout.document_starts, window, front)
        table = compressed.table
        return Sight(
            layout.document_starts, window, front, table.entry_begin, table.entry_end, compressed.selected
        )

    def tokens(self, a: int, b: int, size: int) -> Tensor:
        """[blocks, size, size + window - 1]: which keys of their block's span queries a..b see."""
        token = torch.arange(a, b, device=self.starts.device).view(-1, size, 1)
        place = torch.arange(size + self.window - 1, device=self.starts.device)
        key = token[:, :1] - (self.window - 1) + place
        starts = F.pad(self.starts[a:b], (0, max(0, b - len(self.starts))), value=b).view(-1, size, 1)
        return (key <= token) & (key > token - self.window) & (key >= starts)

    def entries(self, a: int, b: int, num_entries: int) -> Tensor:
        """[b - a, num_entries]: which entries queries a..b see."""
        if self.selected is not None:
            return chosen_mask(self.selected[a:b], num_entries)
        assert self.begin is not None
        assert self.end is not None
        entry = torch.arange(num_entries, device=self.starts.device)
        return (entry >= self.begin[a:b, None]) & (entry < self.end[a:b, None])


def chosen_mask(selected: Tensor, num_entries: int) -> Tensor:
    """[T, k] entries, -1 for none, as [T, num_entries] booleans."""
    mask = torch.zeros(selected.shape[0], num_entries + 1, dtype=torch.bool, device=selected.device)
    return mask.scatter_(1, selected.masked_fill(selected < 0, num_entries), True)[:, :num_entries]


class DenseAttention(torch.autograd.Function):
    """(out [T, H, c], lse [T, H], mass [T, k]) for q [T, H, c], kv [F + T, c], sink [H], entries [E, c].

    `out` is not rotated back; without entries pass none (E = 0). The last two results have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, sink: Tensor, entries: Tensor, sight: Sight
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, heads, width = q.shape
        out, lse = torch.empty_like(q), torch.empty(tokens, heads, dtype=sink.dtype, device=q.device)
        places = 0 if sight.selected is None else sight.selected.shape[1]
        mass = torch.zeros(tokens, places, dtype=sink.dtype, device=q.device)
        for part in _Part.all(q, kv, entries, sight):
            near, far = part.scores(sink.dtype)
            top = torch.maximum(near.amax(-1), sink.repeat(near.shape[1] // heads))
            if far.shape[-1]:
                top = torch.maximum(top, far.amax(-1))
            total = (near - top.unsqueeze(-1)).exp().sum(-1) + (far - top.unsqueeze(-1)).exp().sum(-1)
            total = total + torch.exp(sink.repeat(near.shape[1] // heads) - top)
            statistic = top + total.log()
            near, far = _probabilities(near, statistic), _probabilities(far, statistic)
            mixed = torch.bmm(near.to(q.dtype), part.keys) + torch.matmul(far.to(q.dtype), entries)
            a, b = part.a, min(part.b, tokens)
            out[a:b] = mixed.view(-1, heads, width)[: b - a]
            lse[a:b] = statistic.view(-1, heads)[: b - a]
            if places and sight.selected is not None:
                of_heads = far.view(-1, heads, far.shape[-1]).sum(1)[: b - a]
                chosen = sight.selected[a:b]
                mass[a:b] = of_heads.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0)
        ctx.save_for_backward(q, kv, sink, entries, lse, sight.starts, sight.begin, sight.end, sight.selected)
        ctx.window, ctx.front = sight.window, sight.front
        ctx.mark_non_differentiable(lse, mass)
        return out, lse, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _lse: Tensor, _mass: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, entries, lse, starts, begin, end, selected = ctx.saved_tensors
        sight = Sight(starts, ctx.window, ctx.front, begin, end, selected)
        tokens, heads, width = q.shape
        scale = width**-0.5
        size, window = BLOCK if ctx.window <= BLOCK else ctx.window, ctx.window
        dq, dsink = torch.empty_like(q), torch.zeros_like(sink)
        dentries = torch.zeros_like(entries, dtype=sink.dtype)
        spans = -(-tokens // size) + 1
        dkeys = torch.zeros(spans, size, width, dtype=sink.dtype, device=q.device)
        for part in _Part.all(q, kv, entries, sight):
            a, b = part.a, min(part.b, tokens)
            given = part.of_rows(grad)
            near, far = part.scores(sink.dtype)
            statistic = part.of_rows(lse.unsqueeze(-1)).squeeze(-1)
            near, far = _probabilities(near, statistic), _probabilities(far, statistic)
            dnear = torch.bmm(given, part.keys.transpose(1, 2)).to(sink.dtype)
            dfar = torch.matmul(given, entries.T).to(sink.dtype)
            mean = (near * dnear).sum(-1) + (far * dfar).sum(-1)
            dsink -= (torch.exp(sink - lse[a:b]) * mean.view(-1, heads)[: b - a]).sum(0)
            dnear = ((dnear - mean.unsqueeze(-1)) * near * scale).to(q.dtype)
            dfar = ((dfar - mean.unsqueeze(-1)) * far * scale).to(q.dtype)
            mixed = torch.bmm(dnear, part.keys) + torch.matmul(dfar, entries)
            dq[a:b] = mixed.view(-1, heads, width)[: b - a]
            dspan = torch.bmm(dnear.transpose(1, 2), part.rows).to(sink.dtype)
            dspan += torch.bmm(near.to(q.dtype).transpose(1, 2), given)
            first = part.a // size
            dkeys[first : first + len(dspan)] += dspan[:, :size]
            dkeys[first + 1 : first + 1 + len(dspan), : window - 1] += dspan[:, size:]
            if far.shape[-1]:
                dentries += dfar.flatten(0, 1).T @ part.rows.flatten(0, 1)
                dentries += far.to(q.dtype).flatten(0, 1).T @ given.flatten(0, 1)
        # the first block's span begins window - 1 tokens before the first query
        before = window - 1 - ctx.front
        dkv = dkeys.flatten(0, 1)
        dkv = dkv[before : before + len(kv)] if before >= 0 else F.pad(dkv, (0, 0, -before, 0))[: len(kv)]
        return dq, dkv.to(kv.dtype), dsink, dentries.to(entries.dtype), None


@dataclass(frozen=True)
class _Part:
    """Queries a..b, whole blocks: rows [blocks, size * H, c] and spans of keys [blocks, size + window - 1, c].

    The last block of a row is filled up with queries of zeros that see no token.
    """

    a: int
    b: int
    rows: Tensor
    keys: Tensor
    entries: Tensor
    sight: Sight
    size: int

    @staticmethod
    def all(q: Tensor, kv: Tensor, entries: Tensor, sight: Sight) -> Iterator[_Part]:
        tokens, heads, _ = q.shape
        size = BLOCK if sight.window <= BLOCK else sight.window
        span = size + sight.window - 1
        blocks = -(-tokens // size)
        before = sight.window - 1 - sight.front
        padded = F.pad(kv, (0, 0, before, blocks * size - tokens))  # a negative pad cuts
        spans = padded.contiguous().unfold(0, span, size).transpose(1, 2)
        step = max(1, MOST_SCORES // (size * heads * (span + len(entries))))
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            a, b = first * size, last * size
            rows = _filled(q, a, b).reshape(last - first, size * heads, q.shape[-1])
            yield _Part(a, b, rows, spans[first:last], entries, sight, size)

    def of_rows(self, values: Tensor) -> Tensor:
        """[T, H, x] of these queries, as `rows` lie."""
        return _filled(values, self.a, self.b).reshape(*self.rows.shape[:2], -1)

    def scores(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scaled and masked, over tokens [blocks, size * H, span] and entries [blocks, size * H, E]."""
        heads = self.rows.shape[1] // self.size
        scale = self.rows.shape[-1] ** -0.5
        near = torch.bmm(self.rows, self.keys.transpose(1, 2)).to(wide).mul_(scale)
        seen = self.sight.tokens(self.a, self.b, self.size).unsqueeze(2)
        _hide(near.unflatten(1, (self.size, heads)), seen)
        far = torch.matmul(self.rows, self.entries.T).to(wide).mul_(scale)
        if far.shape[-1]:
            mask = self.sight.entries(self.a, self.b, far.shape[-1])
            mask = F.pad(mask, (0, 0, 0, self.b - self.a - len(mask)))
            _hide(far.unflatten(1, (self.size, heads)), mask.view(-1, self.size, 1, far.shape[-1]))
        return near, far


def _filled(values: Tensor, a: int, b: int) -> Tensor:
    rows = values[a:b]
    return F.pad(rows, (0, 0, 0, 0, 0, b - a - len(rows))) if len(rows) < b - a else rows


def _hide(scores: Tensor, seen: Tensor) -> None:
    scores.masked_fill_(~seen, float("-inf"))


def _probabilities(scores: Tensor, statistic: Tensor) -> Tensor:
    return (scores - statistic.unsqueeze(-1)).exp_()


def indexer_loss(
    operations: ReferenceOperations,
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    selected: Tensor,
    mass: Tensor,
    num_tokens: int,
) -> Tensor:
    """`ReferenceOperations.indexer_loss` from all scores: the mass is spread, no key is gathered."""
    total = queries.new_zeros((), dtype=weights.dtype)
    step = max(1, MOST_SCORES // max(1, queries.shape[1] * len(keys)))
    if not len(keys):
        return total + 0 * (queries.sum() + keys.sum() + weights.sum()).to(total.dtype)
    for a, b in chunks(num_tokens, step) or [(0, 0)]:
        chosen = selected[a:b].masked_fill(selected[a:b] < 0, len(keys))
        target = mass.new_zeros(b - a, len(keys) + 1).scatter_(1, chosen, mass[a:b])[:, :-1]
        seen = chosen_mask(selected[a:b], len(keys))

        def chunk_loss(queries: Tensor, keys: Tensor, weights: Tensor, target: Tensor, seen: Tensor) -> Tensor:
            return kl_divergence(target, operations.index_scores(queries, keys, weights), seen)

        total = total + recomputed(chunk_loss, queries[a:b], keys, weights[a:b], target, seen)
    return total
