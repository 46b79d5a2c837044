"""Cross-entropy of the head, a few logits at a time (page npu_cross_entropy_loss).

Gradients are formed in forward, where the logits are. torch_npu's operator that fuses the product as well
(npu_fused_linear_online_max_sum) is left out: its page restricts `vocab_end_index` to less than the largest
target, which excludes a vocabulary that is whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.reference import TOKEN_CHUNK, chunks


class CrossEntropy(torch.autograd.Function):
    """(sum of weighted losses, log_probs [T] without gradient)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        cast, total = head.to(hidden.dtype), weights.new_zeros(())
        log_probs = weights.new_empty(hidden.shape[0])
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dhead = torch.zeros_like(head) if wants_head else None
        for a, b in chunks(hidden.shape[0], TOKEN_CHUNK):
            logits = (hidden[a:b] @ cast.T).to(weights.dtype)
            loss, log_prob, _, _ = torch.ops.npu.npu_cross_entropy_loss(logits, targets[a:b], reduction="none")
            log_probs[a:b] = -loss
            total = total + (loss * weights[a:b]).sum()
            if not (wants_hidden or wants_head):
                continue
            dlogits = torch.ops.npu.npu_cross_entropy_loss_backward(
                weights[a:b].contiguous(), log_prob, targets[a:b], reduction="none"
            ).to(hidden.dtype)
            if dhidden is not None:
                dhidden[a:b] = dlogits @ cast
            if dhead is not None:
                dhead.add_(dlogits.T @ hidden[a:b])
        ctx.save_for_backward(dhidden, dhead)
        ctx.mark_non_differentiable(log_probs)
        return total, log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _log_probs: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        # in place: as large as the head; a second backward finds them changed and raises
        dhidden = dhidden.mul_(grad) if dhidden is not None else None
        return dhidden, dhead.mul_(grad) if dhead is not None else None, None, None
