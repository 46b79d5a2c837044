"""Gated pooling of windows into compressed entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.core.types import CompressionTable
from fullweight.ops.native import call


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
        call("compress_forward", values, gates, ape, *places, out, *ctx.sizes, torch.get_num_threads())
        ctx.save_for_backward(values, gates, ape, *places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, gates, ape, first, position = ctx.saved_tensors
        dvalues, dgates = torch.zeros_like(values), torch.zeros_like(gates)
        dape = torch.zeros(torch.get_num_threads(), *ape.shape)
        inputs = (grad.contiguous(), values, gates, ape, first, position)
        call("compress_backward", *inputs, dvalues, dgates, dape, *ctx.sizes, torch.get_num_threads())
        return dvalues, dgates, dape.sum(0), None, None
