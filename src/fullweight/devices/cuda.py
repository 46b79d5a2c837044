"""NVIDIA GPUs through torch's own CUDA package; power and links from nvidia-smi.

Run on one NVIDIA H200 under torch 2.11 (docs/nvidia.md); several GPUs, and NCCL between them, never.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fullweight.core.errors import ConfigError
from fullweight.devices.base import Device, MemoryUse, Topology, links_of, tool, visible

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Cuda(Device):
    """One GPU per process."""

    name = "cuda"
    type = "cuda"
    lost_peer = ("ncclRemoteError", "communicator was aborted")

    @classmethod
    def available(cls) -> str | None:
        if not torch.backends.cuda.is_built():
            return f"this torch ({torch.__version__}) was built without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device (driver, CUDA_VISIBLE_DEVICES)"
        return None

    def count(self) -> int:
        return torch.cuda.device_count()

    def device(self, local_rank: int) -> torch.device:
        if local_rank >= self.count():
            raise ConfigError(
                f"LOCAL_RANK is {local_rank} and this process sees {self.count()} CUDA device(s); start as many "
                "ranks on a machine as it has devices, or make more visible (CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def backend(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> MemoryUse:
        free, total = torch.cuda.mem_get_info()
        return MemoryUse(
            allocated=torch.cuda.memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            peak=torch.cuda.max_memory_allocated(),
            free=free,
            total=total,
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def set_deterministic(self, on: bool) -> None:
        """cuBLAS repeats itself only with a workspace of its own, and reads that at the first product."""
        if on:
            os.environ.setdefault(_WORKSPACE, ":4096:8")
        super().set_deterministic(on)

    def range(self, name: str) -> AbstractContextManager[Any]:
        return torch.cuda.nvtx.range(name)

    def watts(self) -> float | None:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        query = ("--query-gpu=power.draw", "--format=csv,noheader,nounits")
        return power_draw(tool("nvidia-smi", *query, f"--id=GPU-{uuid}"))

    def chip(self) -> str:
        return torch.cuda.get_device_name()

    def topology(self) -> Topology:
        numbers = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), self.count())
        matrix = tool("nvidia-smi", "topo", "-m")
        links = links_of(matrix, "GPU", numbers) if matrix is not None else None
        return Topology(self.count(), self.devices_per_chip(), torch.cuda.mem_get_info()[1], links)


def power_draw(text: str | None) -> float | None:
    """Watts from nvidia-smi's answer to `--query-gpu=power.draw`; None where it has none ("[N/A]").

    >>> power_draw("411.20\\n"), power_draw("[N/A]\\n"), power_draw(None)
    (411.2, None, None)
    """
    try:
        return float((text or "").strip())
    except ValueError:
        return None
