"""AdamW for what Muon does not take: embedding, head, norm weights, biases and scales.

It is `torch.optim.AdamW` (decoupled weight decay) in its fused form, one pass over memory, with the settings
DeepSeek-V4 was pre-trained with (report, section 4.2). eps = 1e-20 is a normal fp32 number, so that an entry
which never had a gradient gives 0 / (0 + eps) = 0. Moments are fp32 because the parameters are.

On a CPU the pass is our own (`update.py`), which takes all tensors in one call and clips while it reads gradients:
scaling them beforehand would read and write each once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fullweight.core.config import Config
from fullweight.core.tensors import local_part
from fullweight.optim import update


class AdamWConfig(Config):
    """Moment decays and the denominator's floor."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-20, ge=1e-37, description="at least the smallest normal fp32 number, about 1.2e-38")


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the same state; it multiplies gradients by `gradient_scale` as it reads them."""

    gradient_scale: float = 1.0  # set by clipping before each step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients are not to be used afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [local_part(p.grad) for p in weights]
        if update.compiled_for([*map(local_part, weights), *(g.contiguous() for g in gradients)]):
            for group in self.param_groups:
                self._update(group)
            return loss
        if gradients and self.gradient_scale != 1.0:
            torch._foreach_mul_(gradients, self.gradient_scale)
        super().step()
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        """torch makes and finds the state; the arithmetic is compiled."""
        columns: list[list[Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *columns)
        weights, gradients, firsts, seconds, _, counters = columns
        if not weights:
            return
        torch._foreach_add_(counters, 1)
        weights, gradients, firsts, seconds = (
            [local_part(t) for t in column] for column in (weights, gradients, firsts, seconds)
        )
        gradients = [g.contiguous() for g in gradients]
        steps = [int(counter) for counter in counters]
        update.adamw(
            list(map(update.Moments, weights, gradients, firsts, seconds, steps)),
            scale=self.gradient_scale,
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
        )


def build_adamw(
    groups: list[dict[str, Any]],
    config: AdamWConfig,
    learning_rate: float,
    kind: type[AdamW] = AdamW,
) -> AdamW:
    """AdamW, of this class, over param groups that each set their own "weight_decay"."""
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=learning_rate, betas=betas, eps=config.eps, fused=True)
