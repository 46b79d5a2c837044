"""Mixture of experts with one shared expert; routed by a table of token ids in the first layers.

The router is fp32: affinity sqrt(softplus(x W^T)); scored layers take the top K of affinity + bias and weigh
by the affinity alone, hash layers take the table's experts and still weigh by affinity. Dropless unless a
capacity is set (`capacity.py`). The bias is no gradient parameter: after each step it moves against the load.
Source: report section 2.4, DeepSeek-V3 sections 2.1.2 (bias, sequence-wise balance loss).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullweight.models.deepseek_v4.cache import DecodeContext
from fullweight.models.deepseek_v4.capacity import within_capacity
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.ops.recompute import keep, remade
from fullweight.ops.reference import ReferenceOperations


class Gate(nn.Module):
    """Affinities and the choice of experts. `bias` [X] fp32 or `tid2eid` [V, K] int64 are buffers."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations, hashed: bool) -> None:
        super().__init__()
        self.config, self.ops, self.hashed = config, ops, hashed
        self.bias_trains = not hashed
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if hashed:
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(affinities [T, X] fp32, chosen [T, K] int64, weights [T, K] fp32)."""
        logits = self.ops.wide_linear(x, self.weight)
        # the floor keeps sqrt's gradient finite where softplus underflows
        affinity = F.softplus(logits).clamp(min=1e-30).sqrt()
        chosen = self.choose(affinity.detach(), tokens)
        picked = affinity.gather(1, chosen)
        weights = picked / picked.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        return affinity, chosen, weights

    def choose(self, affinity: Tensor, tokens: Tensor) -> Tensor:
        if self.hashed:
            return self.get_buffer("tid2eid")[tokens]
        biased = affinity + self.get_buffer("bias")
        return biased.topk(self.config.num_experts_per_tok, -1, sorted=False).indices


class Experts(nn.Module):
    """Routed experts stacked: gate_up [X, 2f, d] (gate rows first), down [X, d, f].

    Where not all experts are here, `dispatch` brings the rows to theirs and back.
    """

    dispatch: Callable[..., Tensor] | None = None

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations) -> None:
        super().__init__()
        self.ops, self.limit = ops, config.swiglu_limit
        d, f, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate_up = nn.Parameter(torch.empty(count, 2 * f, d))
        self.down = nn.Parameter(torch.empty(count, d, f))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.dispatch is not None:
            return self.dispatch(x, chosen, weights, self.gate_up, self.down, self._compute)
        return self._compute(x, chosen, weights, self.gate_up, self.down)

    def _compute(self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return self.ops.experts(x, chosen, weights, gate_up, down, self.limit)


class SharedExpert(nn.Module):
    """The expert that every token passes; clamped like the others."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations) -> None:
        super().__init__()
        self.ops, self.limit = ops, config.swiglu_limit
        d, f = config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(2 * f, d))
        self.down = nn.Parameter(torch.empty(d, f))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(keep(self._activate, self.ops.linear(x, self.gate_up)), self.down)

    def _activate(self, gate_up: Tensor) -> Tensor:
        return self.ops.swiglu(gate_up, self.limit)


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer; `recompute` makes the routed ones again.

    In training passes an expert takes no more than `capacity_factor` times its even share of a row; None: all.
    """

    recompute: bool = False
    capacity_factor: float | None = None

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations, hashed: bool) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(config, ops, hashed)
        self.experts = Experts(config, ops)
        self.shared_experts = SharedExpert(config, ops)

    def forward(self, x: Tensor, context: Context | DecodeContext) -> Tensor:
        """x [T, d] -> [T, d]; reports expert counts, drops and the balance loss to `context.aux`."""
        affinity, chosen, weights = self.gate(x, context.tokens)
        if isinstance(context, Context):
            context.aux.expert_counts.append(self._count(chosen, context.valid))
            if context.with_losses and not self.gate.hashed:
                context.aux.balance.append(balance_loss(affinity, context, self.config.num_experts_per_tok))
            chosen, weights = self._limited(chosen, weights, context)
        if self.recompute and isinstance(context, Context):
            return remade(self.experts, x, chosen, weights) + self.shared_experts(x)
        return self.experts(x, chosen, weights) + self.shared_experts(x)

    def _limited(self, chosen: Tensor, weights: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The choices, those beyond an expert's capacity turned into none at weight 0; reports how many."""
        dropped = torch.zeros((), dtype=torch.int64, device=chosen.device)
        if context.with_losses and self.capacity_factor is not None:
            experts, row_tokens = self.config.n_routed_experts, len(chosen) * context.axis.slice.count
            capacity = self.config.expert_capacity(self.capacity_factor, row_tokens)
            kept = within_capacity(chosen, weights, context.valid, experts, capacity, context.axis)
            dropped = (~kept & context.valid.unsqueeze(1)).sum()
            chosen, weights = chosen.masked_fill(~kept, experts), weights * kept
        context.aux.dropped.append(dropped)
        return chosen, weights

    def _count(self, chosen: Tensor, valid: Tensor) -> Tensor:
        counts = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=chosen.device)
        ones = valid.to(torch.int64).unsqueeze(1).expand_as(chosen)
        return counts.scatter_add(0, chosen.flatten(), ones.flatten())


def balance_loss(affinity: Tensor, context: Context, top_k: int) -> Tensor:
    """Sum over documents of sum_i f_i P_i, the sequence-wise balance loss of DeepSeek-V3 (eqs. 17-20).

    f_i = X / (K L) * #{t: expert i among the K highest affinities}, P_i = mean over the document's L tokens
    of the normalised affinity; affinity [T, X]. Padding counts for nothing. Of a document that lies in several
    slices each gives its tokens' part of P_i; f_i and L are the whole document's.
    """
    documents, experts = context.num_documents, affinity.shape[1]
    valid = context.valid.to(affinity.dtype).unsqueeze(1)
    best = torch.zeros_like(affinity).scatter(1, affinity.detach().topk(top_k, -1).indices, 1.0)
    share = affinity / affinity.sum(-1, keepdim=True)
    zeros = affinity.new_zeros(documents, experts)
    # counts, exact in fp32 in whatever order they are added; a last column counts tokens
    seen = affinity.new_zeros(documents, experts + 1).index_add(
        0, context.documents, torch.cat((best, torch.ones_like(valid)), 1) * valid
    )
    load, lengths = context.axis.sum(seen).split((experts, 1), 1)
    shares = zeros.index_add(0, context.documents, share * valid)
    scale = experts / top_k / lengths.squeeze(1).clamp(min=1).square()
    return ((load * shares).sum(-1) * scale).sum()


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """bias_i += speed * sign(mean load - load_i), in place; counts [X] over the global batch."""
    load = counts.to(torch.float64)
    bias += speed * torch.sign(load.mean() - load).to(bias.dtype)
