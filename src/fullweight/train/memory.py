"""Whether the state of a training run fits where it would be put, asked before any of it is made.

Counted is what is there at every step whatever the data: master weights, and of what trains the gradients and the
optimiser's moments (one for a matrix under Muon, two under AdamW). All are cut over the ranks of a replica; ranks
of one machine share its memory, a CUDA device is a rank's own. So this is a lower bound: a run that passes may
still be too large for its activations, a run that fails it could never have begun.

Left out: activations, which grow with data.row_tokens, and the planner's finer count by rank.
"""

from __future__ import annotations

import os

import torch

from fullweight.core.machine import require_memory
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import Layout
from fullweight.train.config import RunConfig
from fullweight.train.weights import empty_model


def state_bytes(config: RunConfig, architecture: DeepSeekV4Config) -> int:
    """Bytes of one whole copy of weights, gradients and moments."""
    model = empty_model(config, architecture, "cpu")
    roles, total = model.parameter_roles(), 0
    for name, parameter in model.named_parameters():
        tensors = 1
        if parameter.requires_grad:
            muon = config.optimizer.name == "muon" and roles[name].optimizer == "muon"
            tensors += 1 + (1 if muon else 2)
        total += parameter.numel() * parameter.element_size() * tensors
    return total


def check_memory(config: RunConfig, architecture: DeepSeekV4Config, layout: Layout, device: torch.device) -> None:
    """Raise ConfigError when the ranks here cannot hold their shares of the run's state."""
    share = state_bytes(config, architecture) * layout.replicate // layout.world
    fix = "use ranks on more machines, a smaller model, or freeze what need not train (train.frozen)"
    what = f"training {architecture.num_parameters(mtp=True):,} parameters (weights, gradients and moments"
    if device.type == "cuda":
        require_memory(share, f"{what}, this rank's share)", fix, torch.cuda.mem_get_info(device)[0])
        return
    here = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), layout.world)
    shares = "" if layout.world == 1 else f", the shares of {here} of {layout.world} ranks"
    require_memory(share * here, f"{what}{shares})", fix)
