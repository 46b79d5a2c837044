"""Operations for CUDA: torch's own products, and formulas that `torch.compile` makes kernels of where that pays.

Experts are torch's grouped products, bf16 as everywhere and of widths in eighths; another type or width raises.
Attention and the indexer's loss are dense products (`dense.py`). Norms, rotation, SwiGLU and the mixing of streams
are the formulas of `fused.py`, which keep for backward what came in, as it came. The rest is the reference, which
runs on CUDA as it is. Values and gradients are tested on the CPU, where all of it runs too, and on a GPU by
`tests/device`.

FlexAttention was measured on one H200 and left: at 4,096 tokens, 64 heads of 512 channels, forward and backward
took 295 ms in a sliding layer where the reference took 86, and 1.7 s with compressed entries (docs/nvidia.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.ops import fused
from fullweight.ops.accelerator import AcceleratorOperations
from fullweight.ops.dense import DenseAttention, Sight, indexer_loss
from fullweight.ops.mixture import GroupedProducts, by_expert
from fullweight.ops.reference import AttentionOutput, Compressed, Workload

LANES = 8  # bf16 rows of the grouped products begin at multiples of 16 bytes


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
        activation: Tensor = fused.run(fused.swiglu, gate_up, limit)
        return activation

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, limit: float) -> Tensor:
        found: Tensor = fused.run(fused.swiglu_backward, gate_up, grad, limit)
        return found


class CudaOperations(AcceleratorOperations):
    """Torch's fused operations for CUDA."""

    name = "cuda"
    torch_alone = True
    products = CudaProducts

    def takes(self, group: str, workload: Workload) -> bool:
        return group != "experts" or workload.dtype == torch.bfloat16

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return fused.NormRotary.apply(x, weight, eps, None, None)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fused.Rotary.apply(x, cos, sin)

    def norm_rotary(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        return fused.NormRotary.apply(x, weight, eps, cos, sin)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return fused.SwiGlu.apply(gate_up, limit)

    def hyper_mix(self, streams: Tensor, pre: Tensor) -> Tensor:
        return fused.HyperMix.apply(streams, pre)

    def _hyper_logits(self, streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
        return fused.HyperLogits.apply(streams, fn, norm_eps)

    def hyper_post(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return fused.HyperPost.apply(streams, y, post, comb)

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

    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        for width in gate_up.shape[1:] + down.shape[1:]:
            if width % LANES:
                raise OperationError(
                    f"experts of the cuda operations: torch's grouped products take widths that are multiples of "
                    f'{LANES}, found {width}; set ops.experts = "reference"'
                )
        return super().experts(x, chosen, weights, gate_up, down, limit)

    def check_experts(self, x: Tensor) -> None:
        if x.dtype != torch.bfloat16:
            found = str(x.dtype).removeprefix("torch.")
            raise OperationError(
                f"experts of the cuda operations: torch's grouped products take bfloat16, found {found}; "
                'set ops.experts = "reference"'
            )
