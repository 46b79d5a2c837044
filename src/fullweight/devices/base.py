"""What the system asks of an accelerator: one contract, and nothing else in the code names a vendor.

An object stands for the one device of this process, the one that `device` made current; the other methods speak of
it. `DEVICES` in the package's head is the table, `find` chooses by name, `of` answers for a tensor's device.
Streams, events and pinned memory are torch's own generic ones (`torch.Stream`, `torch.accelerator`), which every
vendor's package implements, so they are not repeated here.

What a vendor's tool alone can say (power, links) is read from the tool, and is None when it cannot be read, never
a guess. Left out: choosing operations (`ops/`), checking that a machine is ready, planning figures of chips.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullweight.devices.power import PowerMeter, Readings

_TOOL_SECONDS = 20.0


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device. `peak` is the most that was allocated since the start or the last `reset_peak`."""

    allocated: int  # by tensors; on a CPU, resident in this process
    reserved: int  # taken from the device by the allocator, allocated included
    peak: int
    free: int  # what this process could still take, with other processes as they are
    total: int


@dataclass(frozen=True)
class Topology:
    """The devices of this node. None is unknown."""

    num_devices: int
    devices_per_chip: int | None
    memory_bytes: int | None  # of one device
    links: tuple[tuple[str, ...], ...] | None = None
    """From device i to device j in the words of the vendor's tool, such as "NV18" or "HCCS"; "X" to itself."""


class Device(ABC):
    """One kind of device, as a process uses it."""

    name: ClassVar[str]
    """As recipes have it."""
    type: ClassVar[str]
    """As torch has it."""
    separate_memory: ClassVar[bool] = True
    """Whether its memory is its own and not the host's, which the ranks of a machine share."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Python packages that it needs beside torch, for the run's record."""
    lost_peer: ClassVar[tuple[str, ...]] = ()
    """What its collectives say when the fault is another rank's."""

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """None when a process here can use it, else why not, in words that follow "because"."""

    @abstractmethod
    def count(self) -> int:
        """Devices that this process can see."""

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of a rank of this machine, made current; raises ConfigError when there is none for it."""

    @abstractmethod
    def backend(self) -> str:
        """What `init_process_group` is told: gloo for host tensors, and the vendor's for the device's."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all that was queued on the device is done."""

    @abstractmethod
    def memory(self) -> MemoryUse:
        """Memory as it is now."""

    @abstractmethod
    def reset_peak(self) -> None:
        """From now on `memory().peak` is of what follows."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """State of the device's random generator: uint8 on the host."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """The generator goes on from a state that `rng_state` gave."""

    def set_deterministic(self, on: bool) -> None:
        """From now on torch takes operations that repeat bit for bit, and raises where it has none; or not.

        To reach collectives it has to come before the process group. Raises ConfigError when the environment asks
        for the opposite.
        """
        torch.use_deterministic_algorithms(on)
        aids: Any = torch.utils.deterministic
        aids.fill_uninitialized_memory = not on  # torch's own default would write every new tensor

    @abstractmethod
    def range(self, name: str) -> AbstractContextManager[Any]:
        """What runs inside is a range of that name in the vendor's profiler."""

    @abstractmethod
    def watts(self) -> float | None:
        """Power now, in W. Of a chip that holds several devices, this one's even share, so that ranks add up."""

    def power_meter(self) -> PowerMeter:
        """A meter for stretches of time such as a step; those of a machine's ranks add up to its power."""
        index = torch.accelerator.current_device_index()  # a thread begins on the first device
        return Readings(self.watts, enter=lambda: torch.accelerator.set_device_index(index))

    @abstractmethod
    def chip(self) -> str:
        """The model's name, as the driver says it."""

    def devices_per_chip(self) -> int | None:
        """How many devices a chip is, by its name; None where that is not known."""
        return 1

    @abstractmethod
    def topology(self) -> Topology:
        """The devices of this node and how they are connected."""


def tool(*command: str) -> str | None:
    """Output of a vendor's command; None when it is absent, fails or takes longer than 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def links_of(text: str, row: str, devices: Sequence[int]) -> tuple[tuple[str, ...], ...] | None:
    """Links among `devices` from a tool's matrix, whose rows begin with `row` and a number; None if any lacks.

    >>> links_of("      GPU0  GPU1  CPU Affinity\\nGPU0   X    NV18  0-51\\nGPU1  NV18   X    0-51", "GPU", [0, 1])
    (('X', 'NV18'), ('NV18', 'X'))
    """
    rows: dict[int, list[str]] = {}
    for line in text.splitlines():
        first, *cells = line.split() or [""]
        number = first.removeprefix(row)
        if first.startswith(row) and number.isdigit() and cells and not cells[0].startswith(row):
            rows[int(number)] = cells
    columns = {number: place for place, number in enumerate(rows)}
    if not rows or any(d not in columns or len(rows[d]) < len(rows) for d in devices):
        return None
    return tuple(tuple(rows[i][columns[j]] for j in devices) for i in devices)


def visible(variable: str | None, num_devices: int) -> list[int]:
    """The machine's numbers of the devices that a process sees, from the variable that lists them.

    >>> visible("4,5", 2), visible(None, 2)
    ([4, 5], [0, 1])
    """
    listed = [part.strip() for part in (variable or "").split(",")]
    if not all(part.isdigit() for part in listed):
        return list(range(num_devices))
    return [int(part) for part in listed][:num_devices]
