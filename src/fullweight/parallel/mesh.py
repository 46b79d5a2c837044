"""The ranks of a run: who this process is, and the few agreements that ranks must reach.

One object serves a plain process and `torchrun` alike: alone, every agreement is the identity and no process
group exists, so the same loop runs in both. Reductions are of small host-side vectors (counts, flags); model
gradients are reduced by FSDP (`fsdp.py`). Left out: every mesh axis but data parallelism.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fullweight.core.errors import ConfigError, TrainingError

DeviceName = Literal["auto", "cpu", "cuda"]
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; `mesh` is None when it runs alone."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes the run folder."""
        return self.rank == 0

    def reduce(self, values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
        """All ranks' `values` (any shape, any device) combined element by element; a new tensor."""
        result = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(result, _OPERATIONS[operation])
        return result

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: every rank gets the same answer."""
        return bool(self.reduce(torch.tensor(float(flag)), "max").item()) if self.size > 1 else flag

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (picklable) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable) in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first_failure(self) -> Iterator[None]:
        """Run a block that only rank 0 does real work in; its failure stops every rank, not rank 0 alone."""
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        message = self.broadcast(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if message is not None:
            raise TrainingError(f"stopped because rank 0 failed: {message}")


def choose_device(name: DeviceName) -> torch.device:
    """The device of this process; raises ConfigError when the one asked for is absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("train.device is 'cuda' but this torch sees no CUDA device; use 'cpu' or 'auto'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device_name: DeviceName = "auto") -> Iterator[Ranks]:
    """Join the ranks that torchrun started (its environment variables say so), or run alone.

    The process group is torn down on leaving. Collectives work on host tensors (gloo) on every machine, and
    on device tensors too (nccl) where the device is CUDA.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Ranks(dist.get_rank(), size, device, init_device_mesh(device.type, (size,)))
    finally:
        dist.destroy_process_group()
