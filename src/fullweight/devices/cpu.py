"""The host's processor as a device: gloo, memory of the process, power from RAPL where it may be read."""

from __future__ import annotations

import os
import platform
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fullweight.core.machine import available_memory_bytes, total_memory_bytes
from fullweight.devices.base import Device, MemoryUse, Topology
from fullweight.devices.power import Elsewhere, EnergyCounters, PowerMeter

_POWERCAP = Path("/sys/class/powercap")
_POWER_SECONDS = 0.1


class Cpu(Device):
    """One CPU device per process, whatever the number of sockets: ranks of a machine share it."""

    name = "cpu"
    type = "cpu"
    separate_memory = False
    lost_peer = (
        *("Connection closed by peer", "Connection reset by peer", "Socket unexpectedly closed", "Broken pipe"),
        *("Application timeout caused pair closure", "Timed out waiting"),
    )

    @classmethod
    def available(cls) -> str | None:
        return None

    def count(self) -> int:
        return 1

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def backend(self) -> str:
        return "gloo"

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def memory(self) -> MemoryUse:
        """Of the process: `peak` is the kernel's high-water mark of resident memory."""
        resident = psutil.Process().memory_info().rss
        peak = max(_peak_bytes() or 0, resident)
        return MemoryUse(resident, resident, peak, available_memory_bytes(), total_memory_bytes())

    def reset_peak(self) -> None:
        """Where the kernel does not let the mark be reset (containers may not), it stays that of the process."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return

    def rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def range(self, name: str) -> AbstractContextManager[Any]:
        return torch.profiler.record_function(name)

    def watts(self) -> float | None:
        """All packages of the machine, from two readings of their energy counters a tenth of a second apart."""
        meter = EnergyCounters(energy_joules, time.perf_counter)
        if not meter.readable:
            return None
        time.sleep(_POWER_SECONDS)
        return meter.watts()

    def power_meter(self) -> PowerMeter:
        return EnergyCounters(energy_joules) if os.environ.get("LOCAL_RANK", "0") == "0" else Elsewhere()

    def chip(self) -> str:
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            return platform.processor()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()

    def topology(self) -> Topology:
        return Topology(1, 1, total_memory_bytes())


def energy_joules(folder: Path | None = None) -> dict[str, tuple[float, float]] | None:
    """(joules counted, where the counter begins anew) of each package; None when any cannot be read."""
    zones: dict[str, tuple[float, float]] = {}
    for zone in sorted((folder or _POWERCAP).glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package, which is in the package's counter
            continue
        try:
            counted, limit = ((zone / n).read_text(encoding="ascii") for n in ("energy_uj", "max_energy_range_uj"))
        except OSError:
            return None
        zones[zone.name] = (int(counted) * 1e-6, int(limit) * 1e-6)
    return zones or None


def _peak_bytes() -> int | None:
    """The kernel's high-water mark of this process; None where there is no such thing."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
    return sizes[0] if sizes else None
