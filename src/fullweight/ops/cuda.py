"""Operations for CUDA: torch's own grouped products for the experts, and projections that keep no cast weight.

The experts are bf16 as everywhere; a type that the grouped products do not take raises. The rest is the reference,
which runs on CUDA as it is. Values are tested on the CPU, where torch's grouped product runs too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.ops.accelerator import AcceleratorOperations
from fullweight.ops.dense import DenseAttention, Sight, indexer_loss
from fullweight.ops.mixture import GroupedProducts, by_expert
from fullweight.ops.reference import AttentionOutput, Compressed, ReferenceOperations, Workload


class CudaProducts(GroupedProducts):
    """torch.nn.functional.grouped_mm, and rows by index."""

    def spread(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        order, place = by_expert(chosen)
        return x.index_select(0, order // chosen.shape[1]), place

    def total(self, rows: Tensor, place: Tensor, top_k: int) -> Tensor:
        return rows.index_select(0, place).unflatten(0, (-1, top_k)).sum(1)

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, weights.to(rows.dtype), offs=ends.to(torch.int32))

    def outer(self, left: Tensor, right: Tensor, like: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=ends.to(torch.int32)).to(like.dtype)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return ReferenceOperations().swiglu(gate_up, limit)

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, limit: float) -> Tensor:
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            return torch.autograd.grad(self.swiglu(leaf, limit), leaf, grad)[0]


class CudaOperations(AcceleratorOperations):
    """Torch's fused operations for CUDA."""

    name = "cuda"
    products = CudaProducts

    def takes(self, group: str, workload: Workload) -> bool:
        return group != "experts" or workload.dtype == torch.bfloat16

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
        entries = q.new_zeros(0, q.shape[-1]) if compressed is None else compressed.entries
        out, lse, mass = DenseAttention.apply(q, kv, sink, entries, Sight.of(q, kv, layout, window, compressed))
        selected = compressed is not None and compressed.selected is not None
        return AttentionOutput(self.rotary(out, turn[0], -turn[1]), lse, mass if selected else None)

    def indexer_loss(
        self, queries: Tensor, keys: Tensor, weights: Tensor, selected: Tensor, mass: Tensor, num_tokens: int
    ) -> Tensor:
        return indexer_loss(self, queries, keys, weights, selected, mass, num_tokens)

    def check_experts(self, x: Tensor) -> None:
        if x.dtype != torch.bfloat16:
            found = str(x.dtype).removeprefix("torch.")
            raise OperationError(
                f"experts of the cuda operations: torch's grouped products take bfloat16, found {found}; "
                'set ops.experts = "reference"'
            )
