"""Whether the state of a training run fits where it would be put, asked before any of it is made.

Counted is what is there at every step whatever the data: master weights, and of what trains the gradients and the
optimiser's moments (one for a matrix under Muon, two under AdamW). All are cut over the ranks of a replica; ranks
of one machine share its memory, an accelerator's is a rank's own, and moments that are offloaded are in the
machine's. So this is a lower bound: a run that passes may still be too large for its activations, a run that fails
it could never have begun.

Left out: activations, which grow with data.row_tokens, and the planner's finer count by rank.
"""

from __future__ import annotations

import os

import torch

from fullweight.core.machine import require_memory
from fullweight.devices import of, separate
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import Layout
from fullweight.train.config import RunConfig
from fullweight.train.weights import empty_model


def state_bytes(config: RunConfig, architecture: DeepSeekV4Config, *, with_moments: bool = True) -> int:
    """Bytes of one whole copy of weights, gradients and moments, or of weights and gradients."""
    model = empty_model(config, architecture, "cpu")
    roles, total = model.parameter_roles(), 0
    for name, parameter in model.named_parameters():
        tensors = 1
        if parameter.requires_grad:
            muon = config.optimizer.name == "muon" and roles[name].optimizer == "muon"
            tensors += 1 + (1 if muon else 2) * with_moments
        total += parameter.numel() * parameter.element_size() * tensors
    return total


def check_memory(config: RunConfig, architecture: DeepSeekV4Config, layout: Layout, device: torch.device) -> None:
    """Raise ConfigError when the ranks here cannot hold their shares of the run's state."""

    def share_of(whole: int) -> int:
        return whole * layout.replicate // layout.world

    share = share_of(state_bytes(config, architecture))
    here = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), layout.world)
    shares = "" if layout.world == 1 else f", the shares of {here} of {layout.world} ranks"
    fix = "use ranks on more machines, a smaller model, or freeze what need not train (train.frozen)"
    training = f"training {architecture.num_parameters(mtp=True):,} parameters"
    if not separate(device):
        require_memory(share * here, f"{training} (weights, gradients and moments{shares})", fix)
        return
    free, held = of(device).memory().free, "weights, gradients and moments"
    if config.parallel.offload_optimizer:
        on_device = share_of(state_bytes(config, architecture, with_moments=False))
        require_memory((share - on_device) * here, f"{training} (moments in host memory{shares})", fix)
        share, held = on_device, "weights and gradients"
    require_memory(share, f"{training} ({held}, this rank's share)", fix, free)
