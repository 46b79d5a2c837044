"""Cross-entropy of the head, a few logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.native import call

LOGITS = 1 << 23  # logits that exist at the same time, unless the vocabulary is so large that ...
ROWS = 512  # ... fewer tokens than this would share one pass over the head's gradient


class CrossEntropy(torch.autograd.Function):
    """(sum of weighted losses, log_probs [T]); gradients are formed in forward, where the logits are."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.contiguous()
        total, vocabulary = hidden.shape[0], head.shape[0]
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        needed = wants_hidden or wants_head
        cast, wide = head.detach().to(hidden.dtype), weights.detach().float().contiguous()
        log_probs = torch.empty(total)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dhead = torch.zeros(head.shape) if wants_head and not total else None
        size = max(LOGITS // vocabulary, ROWS)
        for a in range(0, total, size):
            b = min(a + size, total)
            logits = hidden[a:b] @ cast.T
            sizes = (b - a, vocabulary, int(needed), torch.get_num_threads())
            call("cross_entropy", logits, targets[a:b], wide[a:b], log_probs[a:b], *sizes, dtype=hidden.dtype)
            if dhidden is not None:
                torch.mm(logits, cast, out=dhidden[a:b])
            if wants_head:
                part = logits.T @ hidden[a:b]
                dhead = part.float() if dhead is None else dhead.add_(part)
        if needed:
            ctx.save_for_backward(dhidden, dhead)
            ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(log_probs)
        return -(log_probs.double() * wide).sum().float(), log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _log_probs: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        # in place: as large as the head; a second backward finds them changed and raises
        dhidden = dhidden.mul_(grad) if dhidden is not None else None
        dhead = dhead.mul_(grad).to(ctx.head_dtype) if dhead is not None else None
        return dhidden, dhead, None, None
