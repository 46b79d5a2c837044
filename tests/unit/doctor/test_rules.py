"""Constructed environments: each names what is wrong, how bad it is, and what would mend it."""

from __future__ import annotations

import shlex

import pytest

from fullweight.doctor.findings import Severity, blocking, exports, refusal
from fullweight.doctor.rules import check_environment
from fullweight.doctor.settings import Setting

GOOD = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}
ASCEND = Setting("ascend", ranks=128, group_timeout_seconds=3720)
CUDA = Setting("cuda", ranks=64, group_timeout_seconds=3720)
ALLOC, NEW_ALLOC = "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"

# (setting, environment, {name: severity} of the errors and warnings)
CASES = [
    (ASCEND, {}, {}),
    (Setting("ascend"), {"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"}, {"TORCH_NPU_FALLBACK_CPU_DISABLE": "warning"}),
    # timeouts in their order
    (ASCEND, {"HCCL_EXEC_TIMEOUT": "1868"}, {"HCCL_EVENT_TIMEOUT": "error"}),
    (ASCEND, {"HCCL_EXEC_TIMEOUT": "1867"}, {}),
    (ASCEND, {"HCCL_EVENT_TIMEOUT": "1800"}, {"HCCL_EVENT_TIMEOUT": "error"}),
    (ASCEND, {"HCCL_EVENT_TIMEOUT": "0"}, {"HCCL_EVENT_TIMEOUT": "warning"}),
    (ASCEND, {"HCCL_EXEC_TIMEOUT": "0"}, {"HCCL_EVENT_TIMEOUT": "error", "HCCL_EXEC_TIMEOUT": "warning"}),
    (
        ASCEND,
        {"HCCL_EXEC_TIMEOUT": "2147480", "HCCL_EVENT_TIMEOUT": "2147483"},
        {"HCCL_EXEC_TIMEOUT": "warning", "HCCL_EVENT_TIMEOUT": "warning"},
    ),
    (ASCEND, {"HCCL_EXEC_TIMEOUT": "3720", "HCCL_EVENT_TIMEOUT": "4000"}, {"HCCL_EXEC_TIMEOUT": "warning"}),
    (ASCEND, {"HCCL_CONNECT_TIMEOUT": "7200"}, {"HCCL_CONNECT_TIMEOUT": "warning"}),
    (ASCEND, {"HCCL_CONNECT_TIMEOUT": "60"}, {"HCCL_CONNECT_TIMEOUT": "error"}),
    (Setting("ascend", group_timeout_seconds=10), {}, {}),  # one rank waits for nobody
    # what hides NaN
    (ASCEND, {"INF_NAN_MODE_ENABLE": "0"}, {"INF_NAN_MODE_ENABLE": "error"}),
    (ASCEND, {"INF_NAN_MODE_FORCE_DISABLE": "1"}, {"INF_NAN_MODE_FORCE_DISABLE": "error"}),
    # what hangs
    (ASCEND, {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"}, {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "error"}),
    (ASCEND, {"HCCL_ASYNC_ERROR_HANDLING": "0"}, {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "error"}),
    (ASCEND, {"HCCL_OP_RETRY_ENABLE": "L0:0, L1:1, L2:1"}, {"HCCL_OP_RETRY_ENABLE": "warning"}),
    (ASCEND, {"HCCL_OP_RETRY_ENABLE": "L1:0,L2:0"}, {}),
    (ASCEND, {"HCCL_OP_RETRY_ENABLE": "L1:1", "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"}, {}),
    (ASCEND, {"TORCH_HCCL_BLOCKING_WAIT": "1"}, {"TORCH_HCCL_BLOCKING_WAIT": "warning"}),
    (ASCEND, {"TORCH_HCCL_DESYNC_DEBUG": "1"}, {"TORCH_HCCL_DESYNC_DEBUG": "error"}),
    (Setting("ascend", 8), {"TORCH_HCCL_DESYNC_DEBUG": "1"}, {"TORCH_HCCL_DESYNC_DEBUG": "warning"}),
    (ASCEND, {"HCCL_OP_EXPANSION_MODE": "AIV"}, {"HCCL_OP_EXPANSION_MODE": "error"}),
    (ASCEND, {"HCCL_WHITELIST_DISABLE": "0"}, {"HCCL_WHITELIST_DISABLE": "error"}),
    (ASCEND, {"HCCL_WHITELIST_DISABLE": "0", "HCCL_WHITELIST_FILE": "/etc/hosts.json"}, {}),
    # memory
    (ASCEND, {ALLOC: "expandable_segments:True", NEW_ALLOC: "expandable_segments:True"}, {ALLOC: "error"}),
    (ASCEND, {ALLOC: "expandable_segments:True,max_split_size_mb:64"}, {ALLOC: "error"}),
    (ASCEND, {NEW_ALLOC: "expandable_segments:True,garbage_collection_threshold:0.8"}, {NEW_ALLOC: "error"}),
    (ASCEND, {ALLOC: "expandible_segments:True"}, {ALLOC: "error"}),
    (ASCEND, {ALLOC: "max_split_size_mb:32,large_segment_size_mb:64"}, {ALLOC: "error"}),
    (ASCEND, {ALLOC: "roundup_power2_divisions:[256:1,512:2,>:8]"}, {}),
    (Setting("ascend", chip="Ascend950DT"), {ALLOC: "page_size:1g"}, {ALLOC: "error"}),
    (ASCEND, {"TORCH_HCCL_ZERO_COPY": "1"}, {"TORCH_HCCL_ZERO_COPY": "error"}),
    (ASCEND, {"TORCH_HCCL_ZERO_COPY": "1", ALLOC: "expandable_segments:True"}, {}),
    (ASCEND, {"PYTORCH_NO_NPU_MEMORY_CACHING": "1"}, {"PYTORCH_NO_NPU_MEMORY_CACHING": "warning"}),
    (ASCEND, {"TASK_QUEUE_ENABLE": "2"}, {}),
    # speed and records
    (ASCEND, {"ASCEND_LAUNCH_BLOCKING": "1"}, {"ASCEND_LAUNCH_BLOCKING": "warning"}),
    (ASCEND, {"TASK_QUEUE_ENABLE": "0"}, {"TASK_QUEUE_ENABLE": "warning"}),
    (ASCEND, {"ASCEND_GLOBAL_LOG_LEVEL": "1"}, {"ASCEND_GLOBAL_LOG_LEVEL": "warning"}),
    (ASCEND, {"TORCH_HCCL_DUMP_ON_TIMEOUT": "1"}, {"TORCH_HCCL_DUMP_ON_TIMEOUT": "warning"}),
    (ASCEND, {"TORCH_HCCL_DUMP_ON_TIMEOUT": "1", "TORCH_HCCL_TRACE_BUFFER_SIZE": "2000"}, {}),
    # determinism
    (Setting("ascend", 2, deterministic=True), {}, {"HCCL_DETERMINISTIC": "error"}),
    (Setting("ascend", 2, deterministic=True), {"HCCL_DETERMINISTIC": "strict"}, {}),
    (Setting("ascend", 1, deterministic=True), {"ATB_MATMUL_SHUFFLE_K_ENABLE": "1"},
     {"ATB_MATMUL_SHUFFLE_K_ENABLE": "error"}),
    (ASCEND, {"HCCL_DETERMINISTIC": "strict", "HCCL_INTER_HCCS_DISABLE": "TRUE"}, {"HCCL_DETERMINISTIC": "error"}),
    # names and values
    (ASCEND, {"HCCL_OP_EXTENSION_MODE": "AI_CPU"}, {"HCCL_OP_EXTENSION_MODE": "warning"}),
    (ASCEND, {"STREAMS_PER_DEVICE": "16"}, {"STREAMS_PER_DEVICE": "error"}),
    (ASCEND, {"HCCL_EXEC_TIMEOUT": "1800s"}, {"HCCL_EXEC_TIMEOUT": "error"}),
    (ASCEND, {"NPU_ASD_ENABLE": "2", "HCCL_UNKNOWN_THING": "1"}, {}),
    (ASCEND, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "NCCL_P2P_DISABLE": "1"}, {}),  # not an Ascend's
    # CUDA
    (CUDA, {}, {}),
    (CUDA, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "error"}),
    (CUDA, {"TORCH_NCCL_ENABLE_MONITORING": "false"}, {"TORCH_NCCL_ENABLE_MONITORING": "warning"}),
    (CUDA, {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "90000"}, {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "warning"}),
    (CUDA, {"TORCH_NCCL_BLOCKING_WAIT": "1"}, {"TORCH_NCCL_BLOCKING_WAIT": "warning"}),
    (CUDA, {"PYTORCH_CUDA_ALLOC_CONF": "a:1", NEW_ALLOC: "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "warning"}),
    (CUDA, {"NVIDIA_TF32_OVERRIDE": "1"}, {"NVIDIA_TF32_OVERRIDE": "error"}),
    (CUDA, {"NVIDIA_TF32_OVERRIDE": "0"}, {}),
    (CUDA, {"CUDA_LAUNCH_BLOCKING": "1"}, {"CUDA_LAUNCH_BLOCKING": "warning"}),
    (CUDA, {"NCCL_P2P_DISABLE": "1"}, {"NCCL_P2P_DISABLE": "warning"}),
    (CUDA, {"NCCL_IB_TIMEOUT": "99"}, {"NCCL_IB_TIMEOUT": "error"}),
    (CUDA, {"NCCL_IB_TIMEOUT": "0"}, {"NCCL_IB_TIMEOUT": "warning"}),  # for ever
    (CUDA, {"NCCL_IB_TIMEOUT": "31", "NCCL_P2P_LEVEL": "nvl", "NCCL_NET_GDR_LEVEL": "7"}, {}),
    (CUDA, {"NCCL_IB_SL": "99"}, {}),  # NCCL's page gives no range: a note
    (CUDA, {"NCCL_DEBUG": "trace"}, {"NCCL_DEBUG": "warning"}),
    (CUDA, {"NCCL_SOCKET_IFNAMES": "eth0"}, {"NCCL_SOCKET_IFNAMES": "warning"}),
    (Setting("cuda", deterministic=True), {"CUBLAS_WORKSPACE_CONFIG": ":8:8"},
     {"CUBLAS_WORKSPACE_CONFIG": "error"}),
    (CUDA, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, {"TORCH_DISTRIBUTED_DEBUG": "warning"}),
    # a laptop
    (Setting("cpu"), {"INF_NAN_MODE_ENABLE": "0", "HCCL_EXEC_TIMOUT": "1", "NCCL_DEBUG": "TRACE"}, {}),
    (Setting("cpu"), {"OMP_NUM_THREADS": "two"}, {"OMP_NUM_THREADS": "error"}),
]  # fmt: skip


def _given(setting: Setting, environment: dict[str, str]) -> dict[str, str]:
    return {**GOOD, **environment} if setting.device == "ascend" else environment


@pytest.mark.parametrize(("setting", "environment", "expected"), CASES)
def test_constructed_environments(setting: Setting, environment: dict[str, str], expected: dict[str, str]) -> None:
    """Errors and warnings are exactly the expected ones; notes may come beside them."""
    found = check_environment(_given(setting, environment), setting)
    assert {f.name: str(f.severity) for f in found if f.severity is not Severity.note} == expected
    assert found == sorted(found, key=lambda f: list(Severity).index(f.severity))


@pytest.mark.parametrize(("setting", "environment", "expected"), CASES)
def test_exports_mend_what_they_can(
    setting: Setting, environment: dict[str, str], expected: dict[str, str]
) -> None:
    """After the printed lines, nothing is left that had a line."""
    values = _given(setting, environment)
    before = check_environment(values, setting)
    for line in exports(before):
        [word, rest] = shlex.split(line)
        name, _, value = rest.partition("=")
        if word == "export":
            values[name] = value
        else:
            values.pop(name, None)
    left = {f.name for f in check_environment(values, setting) if f.severity is not Severity.note}
    assert left & {f.name for f in before if f.exports} == set()


def test_a_misspelling_says_what_was_meant() -> None:
    [finding] = check_environment({**GOOD, "HCCL_OP_EXTENSION_MODE": "AI_CPU"}, Setting("ascend"))[:1]
    assert "did you mean 'HCCL_OP_EXPANSION_MODE'?" in str(finding)
    assert finding.exports == {"HCCL_OP_EXTENSION_MODE": "", "HCCL_OP_EXPANSION_MODE": "AI_CPU"}


def test_accepting() -> None:
    """A warning may be accepted by name, an error may not; the message says which and how."""
    values = {**GOOD, "ASCEND_LAUNCH_BLOCKING": "1", "INF_NAN_MODE_ENABLE": "0"}
    found = check_environment(values, ASCEND)
    assert {f.name for f in blocking(found, ())} == {"ASCEND_LAUNCH_BLOCKING", "INF_NAN_MODE_ENABLE"}
    left = blocking(found, ("ASCEND_LAUNCH_BLOCKING", "INF_NAN_MODE_ENABLE"))
    assert [f.name for f in left] == ["INF_NAN_MODE_ENABLE"]
    assert 'device.accept = ["ASCEND_LAUNCH_BLOCKING"]' in refusal(blocking(found, ()))
    assert "accept" not in refusal(left)
    assert "export INF_NAN_MODE_ENABLE" in refusal(left)
