"""Grouped products of the experts by torch_npu.

`npu_moe_token_permute` copies each token's row once for each of its experts, sorted; `npu_moe_token_unpermute`
with weights of 1 sums a token's rows. Weights of the products are cast where they are used and passed
transposed where they lie so; their gradients are summed in the master weights' fp32
(`npu_grouped_matmul_add_`).

Sources: pages npu_moe_token_permute, npu_moe_token_unpermute, npu_grouped_matmul, npu_grouped_matmul_add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullweight.ops.ascend.elementwise import swiglu, swiglu_backward
from fullweight.ops.mixture import GroupedProducts


class AscendProducts(GroupedProducts):
    """Group lists are cumulative (type 0): lists of counts must not have length 1."""

    def spread(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.npu.npu_moe_token_permute(x, chosen)

    def total(self, rows: Tensor, place: Tensor, top_k: int) -> Tensor:
        ones = rows.new_ones(rows.shape[0] // top_k, top_k)
        return torch.ops.npu.npu_moe_token_unpermute(rows, place, ones)

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.npu.npu_grouped_matmul(
            [rows], [weights.to(rows.dtype)], group_list=ends, split_item=3, group_type=0, group_list_type=0
        )[0]

    def outer(self, left: Tensor, right: Tensor, like: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.npu.npu_grouped_matmul_add_(torch.zeros_like(like), left, right, ends)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return swiglu(gate_up, limit)

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, limit: float) -> Tensor:
        return swiglu_backward(grad, gate_up, limit)
