"""The exact state of a run: what must come back bit for bit so that the next step is the one that followed.

Model parameters and buffers (router biases, hash tables), both optimisers' moments and counters, each rank's
random generators, the position in the data, the step. The learning rate is a function of the step and is not
stored. Everything goes through torch.distributed.checkpoint, tensors as each rank's shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fullweight.checkpoint import store
from fullweight.core.errors import CheckpointError
from fullweight.data.loader import PackedLoader
from fullweight.parallel.mesh import Ranks


@dataclass
class TrainState:
    """What changes from step to step. `step` is the number of steps done."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loader: PackedLoader
    ranks: Ranks
    step: int = 0
    tokens: int = 0  # real tokens trained on so far, all ranks

    def save(self, folder: Path, keep: int) -> Path:
        """Write `folder/step-N`; all ranks together. Raises CheckpointError."""
        return store.save(folder, self.step, self._values(), keep)

    def restore(self, path: Path) -> None:
        """Become the state saved at `path`; all ranks together. Raises CheckpointError or DataError."""
        values = self._values()
        store.load(path, values)
        host = values["host"]
        if host["world_size"] != self.ranks.size:
            raise CheckpointError(
                f"{path} was written by {host['world_size']} rank(s), this is {self.ranks.size}; start "
                f"{host['world_size']} rank(s) to resume exactly"
            )
        set_model_state_dict(self.model, values["model"])
        if self.optimizers:
            set_optimizer_state_dict(self.model, list(self.optimizers), values["optimizer"])
        self.loader.load_state_dict(host["data"])
        self.step, self.tokens = host["step"], host["tokens"]
        _set_random_state(values["random"][f"rank_{self.ranks.rank}"], self.ranks.device)

    def _values(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, list(self.optimizers)),
            "random": {f"rank_{self.ranks.rank}": _random_state(self.ranks.device)},
            "host": {
                "step": self.step,
                "tokens": self.tokens,
                "world_size": self.ranks.size,
                "data": self.loader.state_dict(),
            },
        }


def load_weights(model: nn.Module, path: Path) -> None:
    """Read only the model's tensors of a training checkpoint, in one process. Raises CheckpointError."""
    values: dict[str, Any] = {"model": get_model_state_dict(model)}
    store.load(path, values)
    set_model_state_dict(model, values["model"])


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
