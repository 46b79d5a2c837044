"""A limit to the tokens that an expert takes of a row: what comes beyond it is dropped.

DeepSeek-V4 trains without one, and so does this system unless a recipe names a factor. With one, an expert takes
at most `DeepSeekV4Config.expert_capacity` choices of a row, that is factor x tokens x K / experts; of more it
keeps those of the largest routing weight, of equal ones the earlier in the row, and padding comes after all else.
A dropped choice is not sent, computed or added; the weights of a token's other experts stay as they were.

Why by row: the micro-batch is the same on any layout of ranks, a rank's tokens are not. So the choice of what to
drop is the row's, and holders of its slices put their choices together for it. Training passes alone drop:
held-out losses, answers and decoding are those of the whole model. The router's bias follows what was chosen, not
what was kept, or experts that overflow would all look alike to it.

Left out: filling experts up to their capacity, and renormalising the weights that are left.
Source: by weight, as Megatron-LM's policy "probs"; capacities come from GShard (arXiv 2006.16668).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullweight.models.deepseek_v4.tokens import TokenAxis


@torch.no_grad()
def within_capacity(
    chosen: Tensor, weights: Tensor, valid: Tensor, num_experts: int, capacity: int, axis: TokenAxis
) -> Tensor:
    """Which choices are kept: [s, K] bool of a slice's chosen [s, K] int64, weights [s, K] and valid [s] bool.

    Collective where the row lies in slices.
    """
    priority = torch.where(valid.unsqueeze(1), weights, -1.0)
    # one exchange for both: numbers of experts are exact in fp32
    row = axis.whole(torch.cat((priority, chosen.to(priority.dtype)), 1))
    priorities, experts = row[:, : chosen.shape[1]].flatten(), row[:, chosen.shape[1] :].flatten().long()
    best_first = torch.sort(priorities, descending=True, stable=True).indices
    order = best_first[torch.sort(experts[best_first], stable=True).indices]  # by expert, the best first in each
    counts = experts.new_zeros(num_experts).scatter_add(0, experts, torch.ones_like(experts))
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - first[experts[order]]
    kept = torch.empty_like(rank, dtype=torch.bool)
    kept[order] = rank < capacity
    return kept.view(-1, chosen.shape[1])[slice(*axis.slice.bounds(row.shape[0]))]
