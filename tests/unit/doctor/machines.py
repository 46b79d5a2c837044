"""Constructed facts: a healthy node of each kind, and changes to it."""

from __future__ import annotations

from typing import Any

from fullweight.doctor.facts import Facts, Job

GB = 10**9
_DIES = range(16)
_TWINS = [["SIO" if i // 2 == j // 2 else "HCCS_SW" for j in _DIES] for i in _DIES]
LINKS_910C = tuple(tuple("X" if i == j else _TWINS[i][j] for j in _DIES) for i in _DIES)
HOST: dict[str, Any] = {
    "cpu_count": 192,
    "cores": 192,
    "memory_bytes": 1500 * GB,
    "open_files": 65536,
    "open_files_hard": 1048576,
    "shared_memory_free_bytes": 500 * GB,
    "run_folder": "runs/job",
    "run_folder_free_bytes": 90_000 * GB,
    "interfaces": ("enp67s0f5", "lo"),
    "reserved_ports": "60000-60031",
    "automatic_ports": "32768\t60999",
}
VERSIONS_ASCEND = {
    "python": "3.11.9",
    "torch": "2.13.0+cpu",
    "torch_required": "2.13.0",
    "npu_torch": "2.13.0",
    "cann": "9.2.0",
    "driver": "26.0.RC1",
}
ASCEND: dict[str, Any] = {
    "host_name": "node0",
    "local_size": 16,
    "device": "ascend",
    "asked": "ascend",
    "versions": VERSIONS_ASCEND,
    "devices": {
        "count": 16,
        "chips": ("Ascend910_9391",) * 16,
        "memory_bytes": (64 * GB,) * 16,
        "visible": tuple(range(16)),
        "present": 16,
        "per_chip": 2,
        "links": LINKS_910C,
    },
    "host": HOST,
    "environment": {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1", "CPU_AFFINITY_CONF": "1"},
}
CUDA: dict[str, Any] = {
    **ASCEND,
    "local_size": 8,
    "device": "cuda",
    "asked": "cuda",
    "versions": {
        "python": "3.11.9",
        "torch": "2.13.0+cu130",
        "torch_required": "2.13.0",
        "torch_cuda": "13.0",
        "nccl_library": "2.29.3",
        "driver": "580.95.05",
    },
    "devices": {
        "count": 8,
        "chips": ("NVIDIA H100 80GB HBM3",) * 8,
        "memory_bytes": (85 * GB,) * 8,
        "visible": tuple(range(8)),
        "present": 8,
        "per_chip": 1,
        "links": tuple(tuple("X" if i == j else "NV18" for j in range(8)) for i in range(8)),
    },
    "environment": {},
}
CPU: dict[str, Any] = {
    "host_name": "laptop",
    "device": "cpu",
    "host": {**HOST, "cores": 8, "open_files": 1024},
    "versions": {"python": "3.12.1", "torch": "2.13.0+cpu", "torch_required": "2.13.0"},
    "devices": {"count": 1, "chips": ("a processor",), "memory_bytes": (16 * GB,)},
}


def facts(base: dict[str, Any], **changes: Any) -> Facts:
    """The node with fields, or fields of its parts, changed: `facts(ASCEND, devices={"present": 15})`."""
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = {**base.get(name, {}), **value} if isinstance(base.get(name), dict) else value
    return Facts.resolve(merged)


def job(*machines: Facts, **fields: Any) -> Job:
    """A job of these ranks, with a process group's timeout as fullweight sets it."""
    return Job.resolve({"ranks": len(machines), "group_timeout_seconds": 3720.0, "machines": machines, **fields})
