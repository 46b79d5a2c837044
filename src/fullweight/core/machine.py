"""What this machine has left, asked before something large is begun: memory and disk.

A container's limit counts where it is below what the machine has. Amounts are told in GB (10^9 bytes) with what to
do, because what follows otherwise is an allocation error in the middle of something, or the kernel's killer, which
says nothing at all. Imports no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from fullweight.core.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Bytes that processes of this machine, or container, can still take without swapping."""
    available = psutil.virtual_memory().available
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used + _reclaimable(), 0))
    return available


def total_memory_bytes() -> int:
    """Bytes of memory that this machine, or container, has."""
    total, limit = psutil.virtual_memory().total, _cgroup_number("memory.max")
    return total if limit is None else min(total, limit)


def require_memory(needed_bytes: int, what: str, fix: str, available_bytes: int | None = None) -> None:
    """Raise ConfigError when this machine (or the device whose free bytes are given) cannot hold `what`."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    if needed_bytes > available:
        needed, found = _told(needed_bytes, available)
        raise ConfigError(f"{what} needs {needed} of memory, and {found} are available here; {fix}")


def require_disk(place: Path, needed_bytes: int, what: str, fix: str) -> None:
    """Raise ConfigError when the disk under `place` (which need not exist) has too little room for `what`."""
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        needed, found = _told(needed_bytes, free)
        raise ConfigError(f"{what} needs up to {needed}, and {existing} has {found} free; {fix}")


def _told(*sizes: int) -> list[str]:
    """Bytes in one unit, so that they can be compared at a glance."""
    unit, name = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    return [f"{size / unit:,.1f} {name}" for size in sizes]


def _cgroup_number(name: str) -> int | None:
    """A number of this container's limits; None where there is none (no such file, or "max")."""
    try:
        text = (_CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable() -> int:
    """Bytes of cached files that count as used by the container and are given up when memory is short."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
