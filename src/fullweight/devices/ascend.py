"""Ascend NPUs through torch_npu; power and links from npu-smi. One device is one die: a 910C chip has two.

torch_npu is imported on first use and not before, so that a machine without it, or without CANN, loses nothing but
this device. Names and signatures are those of torch_npu 2.13.0 (`torch_npu/npu/*.py`), and `tests/ascend` compares
them with the package itself. Nothing here has run on a chip; docs/ascend.md says what will show that it does.

An operation that the NPU lacks must not run on the CPU instead, silently and a hundred times slower: torch_npu
refuses that when TORCH_NPU_FALLBACK_CPU_DISABLE=1, which the package's `__init__` sets before torch is imported.
`device` refuses another value, unless FULLWEIGHT_ALLOW_CPU_FALLBACK=1 says that it is meant.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fullweight.core.errors import ConfigError
from fullweight.devices.base import Device, MemoryUse, Topology, links_of, tool, visible
from fullweight.devices.power import Elsewhere, PowerMeter, Readings

FALLBACK = "TORCH_NPU_FALLBACK_CPU_DISABLE"
_ALLOWED = "FULLWEIGHT_ALLOW_CPU_FALLBACK"
_DIES = {"Ascend910_93": 2, "Ascend910B": 1}
"""Devices of one chip, by the beginning of the name; of others it is unknown."""


def torch_npu() -> Any:
    """The vendor's package. Raises ConfigError when it cannot be imported."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ConfigError("torch_npu is not installed (pip install torch_npu==2.13.0)")
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:  # CANN's libraries, or a torch built for another device
        raise ConfigError(
            f"torch_npu cannot be imported ({str(error).strip().splitlines()[0]}); install CANN and source its "
            "set_env.sh, on a machine whose torch is built for CPUs"
        ) from None


class Ascend(Device):
    """One die per process."""

    name = "ascend"
    type = "npu"
    packages = ("torch_npu",)
    lost_peer = (
        *("Some HCCL operations have failed or timed out", "Watchdog caught collective operation timeout"),
        *("EI0002", "EI0006"),  # waited in vain for another rank; could not connect to one
    )

    @classmethod
    def available(cls) -> str | None:
        try:
            npu = torch_npu().npu
        except ConfigError as error:
            return str(error)
        if not npu.is_available():
            return "torch_npu sees no NPU (driver, ASCEND_RT_VISIBLE_DEVICES; `npu-smi info` lists them)"
        return None

    @property
    def _npu(self) -> Any:
        return torch_npu().npu

    def count(self) -> int:
        return int(self._npu.device_count())

    def device(self, local_rank: int) -> torch.device:
        """Also raises ConfigError when operations could fall back to the CPU unseen."""
        _refuse_fallback()
        if local_rank >= self.count():
            raise ConfigError(
                f"LOCAL_RANK is {local_rank} and this process sees {self.count()} NPU(s); start as many ranks "
                "on a machine as it has dies, or make more visible (ASCEND_RT_VISIBLE_DEVICES)"
            )
        self._npu.set_device(local_rank)
        return torch.device("npu", local_rank)

    def backend(self) -> str:
        torch_npu()  # it registers the backend
        return "cpu:gloo,npu:hccl"

    def synchronize(self) -> None:
        self._npu.synchronize()

    def memory(self) -> MemoryUse:
        npu = self._npu
        free, total = npu.mem_get_info()
        return MemoryUse(
            allocated=npu.memory_allocated(),
            reserved=npu.memory_reserved(),
            peak=npu.max_memory_allocated(),
            free=free,
            total=total,
        )

    def reset_peak(self) -> None:
        self._npu.reset_peak_memory_stats()

    def rng_state(self) -> Tensor:
        return self._npu.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        self._npu.set_rng_state(state)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        mstx = self._npu.mstx
        number = mstx.range_start(name)
        try:
            yield
        finally:
            mstx.range_end(number)

    def watts(self) -> float | None:
        return chip_watts(tool("npu-smi", "info"), self._numbers()[self._npu.current_device()])

    def power_meter(self) -> PowerMeter:
        """The tool tells of the whole machine at once: its first rank asks for all of them, the others do not."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return Elsewhere()
        numbers = self._numbers()[: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
        return Readings(lambda: dies_watts(tool("npu-smi", "info"), numbers))

    def chip(self) -> str:
        return str(self._npu.get_device_name())

    def devices_per_chip(self) -> int | None:
        name = self.chip()
        return next((dies for start, dies in _DIES.items() if name.startswith(start)), None)

    def topology(self) -> Topology:
        matrix = tool("npu-smi", "info", "-t", "topo")
        links = None
        if matrix is not None:
            links = links_of(matrix, "Phy-ID", self._numbers()) or links_of(matrix, "NPU", self._numbers())
        return Topology(self.count(), self.devices_per_chip(), self._npu.mem_get_info()[1], links)

    def _numbers(self) -> list[int]:
        return visible(os.environ.get("ASCEND_RT_VISIBLE_DEVICES"), self.count())


def dies_watts(text: str | None, numbers: Sequence[int]) -> float | None:
    """Power of several dies; None when that of any is unknown."""
    watts = [chip_watts(text, number) for number in numbers]
    return None if None in watts else sum(w for w in watts if w is not None)


def chip_watts(text: str | None, number: int) -> float | None:
    """This die's even share of its chip's power, from the table that `npu-smi info` prints; None if it has none.

    Each die has two lines: chip and power, then die and physical number. The power stands at a chip's first die;
    the others have a dash. Where a chip has one die its second line has no physical number, and the chip's counts.
    """
    power: dict[str, float] = {}
    dies: dict[str, list[int]] = {}
    chip = ""
    for cells in ([c.split() for c in line.strip("| ").split("|")] for line in (text or "").splitlines()):
        if len(cells) != 3 or not cells[0] or not cells[0][0].isdigit() or not cells[2]:
            continue
        if re.fullmatch(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f:.]+", "".join(cells[1])):
            dies.setdefault(chip, []).append(int(cells[0][-1]) if len(cells[0]) > 1 else int(chip))
        elif len(cells[0]) > 1:
            chip = cells[0][0]
            if re.fullmatch(r"\d+(\.\d+)?", cells[2][0]):
                power[chip] = float(cells[2][0])
    found = next((c for c, numbers in dies.items() if number in numbers), None)
    return power[found] / len(dies[found]) if found in power else None


def _refuse_fallback() -> None:
    """Raise ConfigError when an operation that the NPU lacks would run on the CPU, and nobody said that it may."""
    if os.environ.get(FALLBACK) != "1" and os.environ.get(_ALLOWED) != "1":
        raise ConfigError(
            f"{FALLBACK}={os.environ.get(FALLBACK, '')} lets operations that the NPU lacks run on the CPU, unseen "
            f"and far slower; unset it (1 is set for you), or say that it is meant with {_ALLOWED}=1"
        )
