"""Devices by name: the one place that knows the vendors. See `base.py` for what a device is asked."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from fullweight.core.config import nearest
from fullweight.core.errors import ConfigError
from fullweight.devices.ascend import Ascend
from fullweight.devices.base import Device, MemoryUse, Topology
from fullweight.devices.cpu import Cpu
from fullweight.devices.cuda import Cuda

DeviceName = Literal["auto", "cpu", "cuda", "ascend"]
DEVICES: dict[str, type[Device]] = {"ascend": Ascend, "cuda": Cuda, "cpu": Cpu}
"""In the order in which "auto" asks them."""

__all__ = ["DEVICES", "Device", "DeviceName", "MemoryUse", "Topology", "absent", "find", "of", "separate"]


def find(name: str = "auto") -> Device:
    """The device called `name`, or for "auto" the first usable one of ascend, cuda and cpu.

    Raises ConfigError, with the reason, when the one that is named cannot be used here.
    """
    if name != "auto" and name not in DEVICES:
        raise ConfigError(f"no device named {name!r}; {nearest(name, ['auto', *DEVICES])}")
    if name == "auto":
        return _only(next(n for n, kind in DEVICES.items() if kind.available() is None))
    reason = DEVICES[name].available()
    if reason is not None:
        raise ConfigError(f"train.device is {name!r} and cannot be used because {reason}; or use 'auto' or 'cpu'")
    return _only(name)


def of(device: torch.device) -> Device:
    """The contract of a tensor's or rank's device."""
    return _only(next(name for name, kind in DEVICES.items() if kind.type == device.type))


def absent() -> dict[str, str]:
    """Why each device that cannot be used here cannot, by name."""
    reasons = {name: kind.available() for name, kind in DEVICES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def separate(device: torch.device) -> bool:
    """Whether tensors of this device lie outside host memory, so that copies gain by pinned memory and streams."""
    return any(kind.type == device.type and kind.separate_memory for kind in DEVICES.values())


@cache
def _only(name: str) -> Device:
    return DEVICES[name]()
