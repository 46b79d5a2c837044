"""The indexer: its choice of entries and its loss over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import CompressionTable
from fullweight.ops.cpu.attention import BLOCK, CHUNK, entry_span
from fullweight.ops.cpu.rows import add_rows, gather_rows
from fullweight.ops.cpu.sizes import sizes
from fullweight.ops.native import call


def select_entries(queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int) -> Tensor:
    """As the reference's; index products exist for a few queries at a time and scores never in memory."""
    total, heads, width = queries.shape
    k = min(topk, keys.shape[0])
    selected = torch.empty(total, k, dtype=torch.int64)
    weights = weights.detach().float().contiguous()
    if not k:
        return selected
    a = 0
    while a < total:
        reached = sizes().entries(table, a, a + CHUNK)
        reach = max(reached[1] - reached[0], 1)
        size = min(CHUNK, sizes().index_products // (heads * reach)) // BLOCK * BLOCK
        b = min(a + max(BLOCK, size), total)
        first, last = entry_span(table, a, b, keys.shape[0])
        products = queries[a:b].reshape(-1, width) @ keys[first:last].T
        low, high = ((x[a:b] - first).to(torch.int32) for x in (table.entry_begin, table.entry_end))
        shape = (b - a, heads, last - first, k, first, torch.get_num_threads())
        call("select_entries", products, weights[a:b], low, high, selected[a:b], *shape, dtype=queries.dtype)
        a = b
    return selected


class IndexLoss(torch.autograd.Function):
    """Sum of KL over the selected entries; its gradients are formed in forward, where the products are."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        selected: Tensor,
        mass: Tensor,
        num_tokens: int,
    ) -> Tensor:
        heads = queries.shape[1]
        k, threads = selected.shape[1], torch.get_num_threads()
        wide = weights.detach().float().contiguous()
        dqueries, dkeys = torch.zeros_like(queries), torch.zeros(keys.shape)
        dweights = torch.zeros_like(wide)
        losses = torch.zeros(threads, dtype=torch.float64)
        total = 0.0
        for a in range(0, num_tokens if k else 0, CHUNK):
            b = min(a + CHUNK, num_tokens)
            index = selected[a:b]
            picked = gather_rows(keys, index)
            products = torch.bmm(queries[a:b], picked.transpose(1, 2))
            counts = (index >= 0).sum(1, dtype=torch.int32)
            losses.zero_()
            sizes = (b - a, heads, k, threads)
            arguments = (products, wide[a:b], counts, mass[a:b], dweights[a:b], losses)
            call("index_loss", *arguments, *sizes, dtype=queries.dtype)
            total += float(losses.sum())
            dqueries[a:b] = torch.bmm(products, picked)
            add_rows(dkeys, index, torch.bmm(products.transpose(1, 2), queries[a:b]))
        ctx.save_for_backward(dqueries, dkeys, dweights)
        ctx.dtypes = keys.dtype, weights.dtype
        return torch.tensor(total, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dqueries, dkeys, dweights = ctx.saved_tensors
        keys_dtype, weights_dtype = ctx.dtypes
        scaled = (dkeys * grad).to(keys_dtype), (dweights * grad).to(weights_dtype)
        return dqueries * grad, *scaled, None, None, None
