"""Rows moved and summed by index."""

from __future__ import annotations

import torch
from torch import Tensor

from fullweight.ops.native import call


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], and row 0 where index < 0; rows [R, c], index [...] -> [..., c]."""
    out, rows = rows.new_empty(*index.shape, rows.shape[1]), rows.contiguous()
    call(
        "gather",
        rows,
        index.contiguous(),
        out,
        index.numel(),
        rows.shape[1],
        torch.get_num_threads(),
        dtype=rows.dtype,
    )
    return out


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows for index >= 0; out [E, c] fp32, index [..., k], rows [..., k, c]."""
    count, width = index.numel(), out.shape[1]
    call("scatter_add", rows, index.contiguous(), out, count, width, torch.get_num_threads(), dtype=rows.dtype)


def combine(rows: Tensor, place: Tensor, tokens: int, top_k: int) -> Tensor:
    """Sums of each token's rows: rows [R, d], place [T * K] -> [T, d]."""
    out = rows.new_empty(tokens, rows.shape[1])
    call("combine", rows, place, out, tokens, top_k, rows.shape[1], torch.get_num_threads(), dtype=rows.dtype)
    return out
