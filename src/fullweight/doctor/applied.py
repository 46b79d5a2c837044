"""Setting the environment that a recipe asks for, before the device's software is loaded.

torch_npu is imported when a run asks for its device (`devices/ascend.py`), and torch reads little at import, so
setting variables of this process is enough and no process is started anew; a process that has torch_npu loaded
already, with other values, is refused. What the shell exports wins over the vetted set, and gives way to the
recipe's own `[device.env]`. What this module set before is taken back first, so that one process may train by
several recipes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fullweight.core.errors import ConfigError
from fullweight.doctor.config import DeviceConfig
from fullweight.doctor.environment import meant_for, relevant, variables


@dataclass(frozen=True)
class Applied:
    """What a recipe set: the set's name (none = no set), the values, and exported values that they replaced."""

    name: str = "none"
    values: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)


_EXCLUSIVE = {"PYTORCH_ALLOC_CONF": "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
_PACKAGE = {"ascend": "torch_npu"}  # which reads variables when it is imported
_DETERMINISTIC = {"ascend": ("HCCL_DETERMINISTIC", "true")}
_last = [Applied()]
_ours: dict[str, tuple[str, str | None]] = {}  # name: (what was set, what was there before)


def likely_device(asked: str, dev: Path = Path("/dev")) -> str:
    """The device that `train.device` will come to, without loading anyone's software."""
    if asked != "auto":
        return asked
    names = [path.name for path in dev.iterdir()] if dev.is_dir() else []
    for device, pattern, package in (("ascend", r"davinci\d+", "torch_npu"), ("cuda", r"nvidia\d+", "torch")):
        if any(re.fullmatch(pattern, n) for n in names) and importlib.util.find_spec(package) is not None:
            return device
    return "cpu"


def apply_environment(
    config: DeviceConfig,
    device: str,
    *,
    deterministic: bool = False,
    environment: MutableMapping[str, str] = os.environ,
) -> Applied:
    """Set what the recipe asks for on `device`. Raises ConfigError when it would come too late."""
    _take_back(environment)
    applied = wanted(config, device, environment, deterministic=deterministic)
    _refuse_late(applied.values, device, environment)
    _ours.update({n: (v, environment.get(n)) for n, v in applied.values.items()})
    environment.update(applied.values)
    _last[0] = applied
    return applied


def current() -> Applied:
    """What was set last in this process."""
    return _last[0]


def _take_back(environment: MutableMapping[str, str]) -> None:
    for name, (value, before) in _ours.items():
        if environment.get(name) == value:
            environment.pop(name)
            environment.update({} if before is None else {name: before})
    _ours.clear()


def wanted(
    config: DeviceConfig, device: str, environment: Mapping[str, str], *, deterministic: bool = False
) -> Applied:
    """What `apply_environment` would set."""
    name: str = config.environment
    if name == "auto":
        name = next((n for n, s in vetted().items() if s["device"] == device), "none")
    chosen = vetted().get(name, {"device": None, "variables": {}})
    values: dict[str, str] = {}
    if chosen["device"] == device:
        offered = {n: v["value"] for n, v in chosen["variables"].items()}
        values = {n: v for n, v in offered.items() if not environment.get(n) and not _excluded(n, environment)}
    if deterministic and device in _DETERMINISTIC and not environment.get(_DETERMINISTIC[device][0]):
        values |= dict([_DETERMINISTIC[device]])
    own = {n: v for n, v in config.env.items() if n in relevant(device) or _unknown_for(n, device)}
    values = {n: v for n, v in values.items() if not _excluded(n, own)} | own
    values = {n: v for n, v in values.items() if environment.get(n) != v}
    replaced = {n: environment[n] for n in values if environment.get(n)}
    return Applied(name if chosen["device"] == device else "none", values, replaced)


@cache
def vetted() -> Mapping[str, Mapping[str, Any]]:
    """Named environments: device, and for each variable value and why."""
    text = resources.files(__package__).joinpath("vetted.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _excluded(name: str, environment: Mapping[str, str]) -> bool:
    return bool(environment.get(_EXCLUSIVE.get(name, "")))


def _unknown_for(name: str, device: str) -> bool:
    return name not in variables() and meant_for(name, device)


def _refuse_late(values: Mapping[str, str], device: str, environment: Mapping[str, str]) -> None:
    package = _PACKAGE.get(device)
    if package is None or package not in sys.modules:
        return
    late = [
        n for n, v in values.items() if n in variables() and variables()[n].at_start and environment.get(n) != v
    ]
    if late:
        lines = " ".join(f'{n}="{values[n]}"' for n in late)
        raise ConfigError(
            f"{package} is imported already and reads {', '.join(late)} at that time; export {lines} before "
            'Python starts, or set device.environment = "none"'
        )
