"""AdamW for what Muon does not take: embedding, head, norm weights, biases and scales.

It is `torch.optim.AdamW` (decoupled weight decay) in its fused form, one pass over memory, with the settings
DeepSeek-V4 was pre-trained with (report, section 4.2). eps = 1e-20 is a normal fp32 number, so that an entry
which never had a gradient gives 0 / (0 + eps) = 0. Moments are fp32 because the parameters are.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from fullweight.core.config import Config


class AdamWConfig(Config):
    """Moment decays and the denominator's floor."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-20, ge=1e-37, description="at least the smallest normal fp32 number, about 1.2e-38")


def build_adamw(
    groups: list[dict[str, Any]],
    config: AdamWConfig,
    learning_rate: float,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """AdamW, of this class, over param groups that each set their own "weight_decay"."""
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=learning_rate, betas=betas, eps=config.eps, fused=True)
