"""A copy of the training state in host memory, so that training can go on while it is written.

The buffers live from one save to the next: only the first snapshot pays for new pages, and on an accelerator they
are pinned. A snapshot that would not fit beside the next step is not taken: a job killed at its first save loses
more than a synchronous save costs.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.checkpoint.store import State
from fullweight.core.tensors import local_part
from fullweight.devices import of, separate

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_SPARE = 1.1  # beyond the copy itself: what writing allocates


class Snapshot:
    """Reused host buffers for one rank's part of a state."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def room(self, state: State) -> str | None:
        """None when the copy fits into this machine's free memory, else why it does not."""
        missing = sum(t.nbytes for n, t in _locals(state).items() if not self._fits(n, t))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = (int(missing * _SPARE) + released_bytes()) * neighbours
        free = available_memory_bytes()
        if not missing or needed <= free:
            return None
        return (
            f"a copy and the next step need {needed / 1e9:,.2f} GB of host memory, {free / 1e9:,.2f} GB are free"
        )

    def take(self, state: State) -> dict[str, Tensor]:
        """The state with every tensor copied to the host; valid until the next call."""
        copy: dict[str, Tensor] = {}
        device: torch.device | None = None
        for name, source in _locals(state).items():
            if not self._fits(name, source):
                pinned = separate(source.device)
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            buffer = self._buffers[name]
            buffer.copy_(source, non_blocking=True)
            device = source.device if separate(source.device) else device
            whole = state[name]
            # Its spec, not from_local: that would move the copy back to the mesh's device.
            copy[name] = (
                DTensor(buffer, whole._spec, requires_grad=False) if isinstance(whole, DTensor) else buffer
            )
        if device is not None:
            of(device).synchronize()
        return copy

    def _fits(self, name: str, source: Tensor) -> bool:
        buffer = self._buffers.get(name)
        return buffer is not None and (buffer.shape, buffer.dtype) == (source.shape, source.dtype)


def released_bytes() -> int:
    """What this process held at its peak and holds no longer: a step will take it again."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    sizes = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest
    }
    return max(sizes.get("VmHWM", 0) - sizes.get("VmRSS", 0), 0)


def available_memory_bytes() -> int:
    """Host memory that this process may still take: the machine's, or its container's when that is less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file in _CGROUPS:
        try:
            limit, used = Path(limit_file).read_text("ascii").strip(), Path(used_file).read_text("ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            free = min(free, max(int(limit) - int(used), 0))
    return free


def _locals(state: State) -> dict[str, Tensor]:
    return {name: local_part(tensor.detach()) for name, tensor in state.items()}
