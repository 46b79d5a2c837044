"""Facts of this rank's machine, read on it: versions, devices, limits, ports, variables.

Reading changes nothing and raises nothing: what cannot be read is None. Places: CANN's version is in an
`*install.info` or `version.info` file under ASCEND_HOME_PATH; drivers say theirs in /usr/local/Ascend/driver and
in /proc/driver/nvidia. Left out: firmware, switches, and other machines of the cluster that run no rank.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch

from fullweight.core.machine import total_memory_bytes
from fullweight.devices import Device, absent
from fullweight.doctor.checks import HCCL_PORTS
from fullweight.doctor.environment import misspelt, recorded, value_of
from fullweight.doctor.facts import Devices, Facts, Host, OperationResult, Versions

DeviceName = Literal["cpu", "cuda", "ascend"]
ASCEND_DRIVER = Path("/usr/local/Ascend/driver/version.info")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_VISIBLE = {"ascend": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_NODES = {"ascend": r"davinci\d+", "cuda": r"nvidia\d+"}  # in /dev, one a device


def gather_facts(
    name: DeviceName,
    device: Device | None,
    *,
    run_folder: Path,
    asked: str = "auto",
    operations_set: str = "",
    operations: Iterable[OperationResult] = (),
    applied: Mapping[str, str] | None = None,
) -> Facts:
    """This rank's facts; `device` is None when the one called `name` cannot be used.

    Links are a machine's, and the vendor's tool that tells them can take seconds: local rank 0 asks it for all.
    """
    environment = dict(os.environ)
    return Facts(
        host_name=socket.gethostname(),
        rank=int(environment.get("RANK", "0")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        device=name,
        asked=asked,
        absent=absent(),
        hardware={kind: count for kind in _NODES if (count := _present(kind))},
        operations_set=operations_set,
        versions=versions(name, environment),
        devices=Devices(present=_present(name)) if device is None else _devices(device, environment),
        host=_host(run_folder, environment),
        environment=kept(environment, name),
        applied=dict(applied or {}),
        operations=tuple(operations),
    )


def kept(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """Variables that checks look at: those that a run records, and what may be one of them misspelt."""
    wrong = {n: v for n, v in environment.items() if misspelt(n, device)}
    return {**recorded(environment), **wrong}


def versions(device: str, environment: Mapping[str, str]) -> Versions:
    """Versions of the software that a run on the device stands on."""
    driver = {"ascend": ascend_driver, "cuda": nvidia_driver}.get(device)
    return Versions(
        python=platform.python_version(),
        torch=str(torch.__version__),
        torch_required=_required_torch(),
        torch_cuda=getattr(torch.version, "cuda", None),
        nccl_library=_nccl() if device == "cuda" else None,
        npu_torch=_version("torch_npu") if device == "ascend" else None,
        cann=cann_version(environment) if device == "ascend" else None,
        driver=driver() if driver is not None else None,
    )


def cann_version(environment: Mapping[str, str]) -> str | None:
    """Version of the CANN that the environment leads to; None when it leads to none."""
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return None
    root = Path(home)
    files = [*root.glob("*-linux/*install.info"), *root.glob("*install.info"), root / "version.info"]
    return next((v for v in map(_stated_version, files) if v), None)


def ascend_driver(path: Path = ASCEND_DRIVER) -> str | None:
    """Version of the Ascend driver (HDK); None when there is none."""
    return _stated_version(path)


def nvidia_driver(path: Path = NVIDIA_DRIVER) -> str | None:
    """Version of the NVIDIA driver; None when there is none."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", _text(path))
    return found[1] if found else None


def _stated_version(path: Path) -> str | None:
    """The value of a line `version=...`, in any case."""
    found = re.search(r"^\s*version\s*=\s*(\S+)", _text(path), re.IGNORECASE | re.MULTILINE)
    return found[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nccl() -> str | None:
    names = sorted({d.name for d in metadata.distributions() if d.name.startswith("nvidia-nccl")})
    return _version(names[0]) if names else None


def _required_torch() -> str | None:
    for line in metadata.requires("fullweight") or ():
        if found := re.fullmatch(r"torch==([\w.]+)", line.replace(" ", "")):
            return found[1]
    return None


def _devices(device: Device, environment: Mapping[str, str]) -> Devices:
    if not device.separate_memory:
        return Devices(count=1, chips=(device.chip(),), memory_bytes=(device.memory().total,))
    count = device.count()
    listed = environment.get(_VISIBLE.get(device.name, ""), "")
    numbers = [int(n) for n in listed.split(",") if n.strip().isdigit()] or list(range(count))
    links = device.topology().links if environment.get("LOCAL_RANK", "0") == "0" else None
    chips, memory = [], []
    alone = "LOCAL_RANK" not in environment  # other ranks tell of their own devices
    for index in range(count) if alone else [int(environment["LOCAL_RANK"])]:
        device.device(index)
        chips.append(device.chip())
        memory.append(device.memory().total)
    if alone and count:
        device.device(0)
    return Devices(
        count=count,
        chips=tuple(chips),
        memory_bytes=tuple(memory),
        visible=tuple(numbers[:count]),
        present=_present(device.name),
        per_chip=device.devices_per_chip(),
        links=links,
    )


def _present(device: str) -> int | None:
    pattern = re.compile(_NODES.get(device, "$"))
    try:
        return sum(1 for path in Path("/dev").iterdir() if pattern.fullmatch(path.name)) or None
    except OSError:
        return None


def _host(run_folder: Path, environment: Mapping[str, str]) -> Host:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    existing = next(p for p in (run_folder, *run_folder.absolute().parents) if p.exists())
    shared = Path("/dev/shm")
    base = value_of("HCCL_IF_BASE_PORT", environment)
    first = int(base) if base.isdigit() else 60000
    return Host(
        cpu_count=os.cpu_count() or 1,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total_memory_bytes(),
        open_files=_limit(soft),
        open_files_hard=_limit(hard),
        shared_memory_free_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
        run_folder=str(run_folder),
        run_folder_free_bytes=shutil.disk_usage(existing).free,
        interfaces=tuple(sorted(psutil.net_if_addrs())),
        ports_in_use=ports_in_use(range(first, first + HCCL_PORTS)),
        reserved_ports=_text(Path("/proc/sys/net/ipv4/ip_local_reserved_ports")).strip(),
        automatic_ports=_text(Path("/proc/sys/net/ipv4/ip_local_port_range")).strip(),
    )


def _limit(value: int) -> int:
    return 2**31 - 1 if value == resource.RLIM_INFINITY else min(value, 2**31 - 1)


def ports_in_use(wanted: range, tables: Iterable[Path] | None = None) -> tuple[int, ...]:
    """Those of the wanted TCP ports that a process of this machine holds, from the kernel's tables.

    Read, not tried: several ranks look at once, and a port that one of them tries is in use for the next.
    """
    found = set()
    for table in tables or (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in _text(table).splitlines()[1:]:
            cells = line.split()
            if len(cells) > 3 and (port := int(cells[1].rpartition(":")[2], 16)) in wanted:
                found.add(port)
    return tuple(sorted(found))
