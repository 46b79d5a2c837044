"""Rules over the variables of NCCL, CUDA and torch on it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from fullweight.doctor.environment import value_of
from fullweight.doctor.findings import Finding, Severity
from fullweight.doctor.settings import (
    LONG_SECONDS,
    Environment,
    Rule,
    Setting,
    equals,
    off,
    on,
    slow,
    told_seconds,
)

_ERROR, _WARNING = Severity.error, Severity.warning


def _cuda_watchdog(environment: Environment, _: Setting) -> Iterator[Finding]:
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if "0" in (environment.get(name), environment.get("NCCL_ASYNC_ERROR_HANDLING")):
        yield Finding(
            _ERROR,
            name,
            "0: a failed collective ends nothing",
            "3 (the default)",
            "the other ranks hang",
            {name: "", "NCCL_ASYNC_ERROR_HANDLING": ""},
        )
    if off(environment, "TORCH_NCCL_ENABLE_MONITORING"):
        yield Finding(
            _WARNING,
            "TORCH_NCCL_ENABLE_MONITORING",
            "off",
            "1",
            "a watchdog that is stuck itself never ends the job",
            {"TORCH_NCCL_ENABLE_MONITORING": "1"},
        )
    if on(environment, "TORCH_NCCL_BLOCKING_WAIT") or environment.get("NCCL_BLOCKING_WAIT") == "1":
        yield slow("TORCH_NCCL_BLOCKING_WAIT", "1", "0", "the host waits for every collective; unset it")
    seconds = value_of("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", environment)
    if seconds.isdigit() and int(seconds) > LONG_SECONDS:
        yield Finding(
            _WARNING,
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
            told_seconds(int(seconds)),
            f"at most {LONG_SECONDS} s",
            "a hang would hold every device for that long",
            {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": ""},
        )


def _cuda_network(environment: Environment, setting: Setting) -> Iterator[Finding]:
    if environment.get("NCCL_IB_TIMEOUT") == "0" and setting.ranks > 1:
        yield Finding(
            _WARNING,
            "NCCL_IB_TIMEOUT",
            "0: RDMA waits for a lost peer for ever",
            "1 to 31 (20 is 30 s in all)",
            "a failed link or machine would be told by the watchdog alone; unset it",
            {"NCCL_IB_TIMEOUT": ""},
        )


def _cuda_memory(environment: Environment, _: Setting) -> Iterator[Finding]:
    if environment.get("PYTORCH_CUDA_ALLOC_CONF") and environment.get("PYTORCH_ALLOC_CONF"):
        yield Finding(
            _WARNING,
            "PYTORCH_CUDA_ALLOC_CONF",
            "set together with PYTORCH_ALLOC_CONF",
            "PYTORCH_ALLOC_CONF alone",
            "torch reads the old name and leaves the new one unread",
            {"PYTORCH_CUDA_ALLOC_CONF": ""},
        )
    if environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        yield slow("PYTORCH_NO_CUDA_MEMORY_CACHING", "set", "", "every tensor is allocated by the driver")


def _cuda_numbers(environment: Environment, setting: Setting) -> Iterator[Finding]:
    for name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"):
        if environment.get(name) == "1":
            yield Finding(
                _ERROR,
                name,
                "1: fp32 products keep 10 bits",
                "unset",
                "the router, norms and hyper-connections are fp32 because they need its bits",
                {name: ""},
            )
    workspace = environment.get("CUBLAS_WORKSPACE_CONFIG")
    if setting.deterministic and workspace and workspace not in (":4096:8", ":16:8"):
        yield Finding(
            _ERROR,
            "CUBLAS_WORKSPACE_CONFIG",
            repr(workspace),
            ":4096:8 or :16:8, for parallel.deterministic = true",
            "torch refuses products otherwise",
            {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )


def _cuda_slow(environment: Environment, _: Setting) -> Iterator[Finding]:
    if on(environment, "CUDA_LAUNCH_BLOCKING"):
        yield slow("CUDA_LAUNCH_BLOCKING", "1", "0", "each kernel is waited for; unset it after debugging")
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        yield slow(
            "CUDA_DEVICE_MAX_CONNECTIONS", "1", "8", "collectives of sharding cannot overlap with computing"
        )
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        if on(environment, name):
            yield slow(name, "1", "0", "a fast path between devices is off; unset it unless it is broken")
    if equals(environment, "NCCL_DEBUG", "TRACE"):
        yield slow("NCCL_DEBUG", "TRACE", "WARN", "every call is printed")


RULES: tuple[Rule, ...] = (_cuda_watchdog, _cuda_network, _cuda_memory, _cuda_numbers, _cuda_slow)
