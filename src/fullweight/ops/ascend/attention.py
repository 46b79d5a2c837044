"""Attention by torch_npu's sparse flash attention: every key of a query is named by its index.

The operator (page npu_sparse_flash_attention; aclnnSparseFlashAttention and its Grad) is multi-query attention
over rows that a list chooses for each query. Ours fits it, with three adaptations:

- Window tokens and compressed entries stand in one key tensor, and each query lists those it sees, valid places
  first. So documents, slices of a row and visibility need no mask (`sparse_mode` 0), and all three kinds of layer
  are one call.
- It expects 64 rotary channels beside the 512 of a head; our rotary channels are the last of the 512, which are
  the value too. The extra ones are zeros, which add nothing to a logit.
- It has no sink on this chip. The sink adds exp(sink) to the softmax's denominator: output and statistics are
  rescaled afterwards, and the backward operator, which reads probabilities and output from these, is given the
  rescaled ones. That is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import PackedLayout
from fullweight.ops.reference import QUERY_CHUNK, Compressed, chunks

HEAD_DIM, ROTARY_DIM = 512, 64
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
STEP, MOST_KEYS = 1024, 8192  # the backward operator takes lists of 1024, 2048, ... 8192 places


@dataclass(frozen=True)
class Sources:
    """From where each query's list is made: [T] or [T, k] int64 tensors that are there anyway."""

    starts: Tensor
    window: int
    front: int  # rows of the keys before the first query's own
    num_keys: int  # where the entries begin
    begin: Tensor | None
    end: Tensor | None
    selected: Tensor | None
    most_entries: int

    @staticmethod
    def of(q: Tensor, kv: Tensor, layout: PackedLayout, window: int, compressed: Compressed | None) -> Sources:
        begin = end = selected = None
        most = 0
        if compressed is not None:
            selected = compressed.selected
            begin, end = compressed.table.entry_begin, compressed.table.entry_end
            most = compressed.entries.shape[0] if selected is None else selected.shape[1]
        front = kv.shape[0] - q.shape[0]
        return Sources(layout.document_starts, window, front, kv.shape[0], begin, end, selected, most)

    @property
    def num_places(self) -> int:
        """Length of every list: the keys there may be, rounded up to what the operator takes."""
        return -(-(self.window + self.most_entries) // STEP) * STEP

    def index(self) -> Tensor:
        """[T, 1, places] int32 rows of the key tensor, -1 last."""
        starts = self.starts.to(torch.int32).unsqueeze(1)
        token = torch.arange(starts.shape[0], dtype=torch.int32, device=starts.device).unsqueeze(1)
        place = torch.arange(self.num_places, dtype=torch.int32, device=starts.device)
        first = torch.maximum(starts, token - (self.window - 1))
        length = token - first + 1
        rest = self._entries(place - length)
        return torch.where(place < length, first + self.front + place, rest).unsqueeze(1)

    def _entries(self, place: Tensor) -> Tensor:
        """Row of the entry at a place [T, places] behind the window's; -1 where there is none."""
        if self.begin is None or self.end is None or not self.most_entries:
            return torch.full_like(place, -1)
        if self.selected is None:
            entry = place + self.begin.to(torch.int32).unsqueeze(1)
            seen = entry < self.end.to(torch.int32).unsqueeze(1)
        else:
            inside = place.clamp(0, self.most_entries - 1)
            entry = self.selected.to(torch.int32).gather(1, inside.long())
            seen = (entry >= 0) & (place < self.most_entries)
        return torch.where(seen, entry + self.num_keys, -1)


class SparseAttention(torch.autograd.Function):
    """(out [T, H, c], lse [T, H] without gradient) for q [T, H, c], keys [S, c] and sink [H]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, sink: Tensor, sources: Sources) -> tuple[Tensor, Tensor]:
        q, shared = q.contiguous(), keys.unsqueeze(1).contiguous()
        out, largest, total = torch.ops.npu.npu_sparse_flash_attention(
            q,
            shared,
            shared,
            sources.index(),
            q.shape[-1] ** -0.5,
            actual_seq_lengths_query=_length(q),
            actual_seq_lengths_kv=_length(shared),
            query_rope=_no_rotary(q),
            key_rope=_no_rotary(shared),
            sparse_block_size=1,
            layout_query="TND",
            layout_kv="TND",
            sparse_mode=0,
            attention_mode=2,
            return_softmax_lse=True,
        )
        # statistics are [1, T, H]; a sink far above or below the logits must not overflow
        with_sink = torch.maximum(largest, sink)
        kept = total * torch.exp(largest - with_sink)
        total = kept + torch.exp(sink - with_sink)
        out = (out * (kept / total).squeeze(0).unsqueeze(-1)).to(q.dtype)
        lse = (with_sink + total.log()).squeeze(0)
        # the choice is this layer's own: autograd must keep it, so that a checkpoint can drop it
        ctx.save_for_backward(q, keys, sink, out, with_sink, total, sources.selected)
        ctx.sources = replace(sources, selected=None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, keys, sink, out, largest, total, selected = ctx.saved_tensors
        sources = replace(ctx.sources, selected=selected)
        shared, grad = keys.unsqueeze(1).contiguous(), grad.contiguous()
        dq, dkeys, dvalues, _, _ = torch.ops.npu.npu_sparse_flash_attention_grad(
            q,
            shared,
            shared,
            sources.index(),
            grad,
            out,
            largest,
            total,
            q.shape[-1] ** -0.5,
            1,
            query_rope=_no_rotary(q),
            key_rope=_no_rotary(shared),
            actual_seq_qlen=_length(q),
            actual_seq_kvlen=_length(shared),
            layout="TND",
            sparse_mode=0,
            attention_mode=2,
        )
        share = torch.exp(sink - largest.squeeze(0)) / total.squeeze(0)  # [T, H]: probability of the sink
        dsink = -(share * (grad.to(share.dtype) * out.to(share.dtype)).sum(-1)).sum(0)
        return dq, (dkeys + dvalues).squeeze(1), dsink, None


@torch.no_grad()
def attention_mass(q: Tensor, lse: Tensor, compressed: Compressed) -> Tensor | None:
    """[T, k] probability of each selected entry summed over heads: what the operator keeps to itself."""
    selected, entries = compressed.selected, compressed.entries
    if selected is None:
        return None
    parts = []
    for a, b in chunks(q.shape[0], QUERY_CHUNK):
        keys = entries[selected[a:b].clamp(min=0)]
        scores = torch.einsum("thc,tsc->ths", q[a:b], keys).to(lse.dtype) * q.shape[-1] ** -0.5
        mass = torch.exp(scores - lse[a:b].unsqueeze(-1)).sum(1)
        parts.append(mass.masked_fill(selected[a:b] < 0, 0.0))
    return torch.cat(parts)


def _length(rows: Tensor) -> Tensor:
    """The operator's cumulative lengths: one sequence, the lists say who sees what."""
    return torch.full((1,), rows.shape[0], dtype=torch.int32, device=rows.device)


def _no_rotary(rows: Tensor) -> Tensor:
    return rows.new_zeros(*rows.shape[:-1], ROTARY_DIM)
