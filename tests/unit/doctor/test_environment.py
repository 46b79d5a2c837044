"""The table of real names: complete entries, legal defaults, misspellings found, and nothing said of the rest."""

from __future__ import annotations

import re
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.doctor.environment import (
    edits,
    misspelt,
    recorded,
    relevant,
    shared,
    value_of,
    variables,
)

NAMES = sorted(variables())
LETTERS = string.ascii_uppercase + "_"


def test_every_entry_is_complete() -> None:
    """Meaning, source, one kind of legal values, and a default that is legal itself."""
    for variable in variables().values():
        kinds = [variable.values, variable.range, variable.number, variable.pattern]
        assert sum(map(bool, kinds)) == 1, variable.name
        assert variable.meaning, variable.name
        assert variable.source, variable.name
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+", variable.name)
        assert not variable.default or variable.legal(variable.default), variable.name
        assert not variable.replaced_by or variable.replaced_by in variables(), variable.name
    assert len(variables()) > 300


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, str, str]:
    """(device, real name, the name after one insertion, deletion, substitution or swap of neighbours)."""
    name = draw(st.sampled_from(NAMES))
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    kind = draw(st.sampled_from(["insert", "delete", "replace", "swap"]))
    if kind == "insert":
        wrong = name[:place] + letter + name[place:]
    elif kind == "delete":
        wrong = name[:place] + name[place + 1 :]
    elif kind == "replace":
        wrong = name[:place] + letter + name[place + 1 :]
    else:
        wrong = name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
    device = variables()[name].device
    return ("cpu" if device == "any" else device), name, wrong


@settings(max_examples=400, deadline=None)
@given(edited())
def test_one_edit_away_is_misspelt(case: tuple[str, str, str]) -> None:
    """Each real name's neighbours lead back to it, or to another real name that is as near."""
    device, name, wrong = case
    found = misspelt(wrong, device)
    if wrong in variables():
        assert found is None
    else:
        assert found is not None
        assert found in relevant(device)
        assert found == name or edits(found, wrong) <= 2 or sorted(found.split("_")) == sorted(wrong.split("_"))


@settings(max_examples=200, deadline=None)
@given(st.text(LETTERS, max_size=12), st.text(LETTERS, max_size=12))
def test_edits_is_a_distance(a: str, b: str) -> None:
    """Symmetric, zero only for equals, and never more than the longer length."""
    assert edits(a, b) == edits(b, a)
    assert (edits(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edits(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("device", "wrong", "right"),
    [
        ("ascend", "HCCL_OP_EXTENSION_MODE", "HCCL_OP_EXPANSION_MODE"),
        ("ascend", "HCCL_EXEC_TIME_OUT", "HCCL_EXEC_TIMEOUT"),
        ("ascend", "HCCL_TIMEOUT_EXEC", "HCCL_EXEC_TIMEOUT"),
        ("ascend", "HCCL_BUFFER_SIZE", "HCCL_BUFFSIZE"),
        ("ascend", "NPU_FALLBACK_CPU_DISABLE", None),
        ("ascend", "TASK_QUEUE_ENABLED", "TASK_QUEUE_ENABLE"),
        ("ascend", "PYTORCH_NPU_ALLOC_CONFIG", "PYTORCH_NPU_ALLOC_CONF"),
        ("cuda", "NCCL_SOCKET_IFNAMES", "NCCL_SOCKET_IFNAME"),
        ("cuda", "TORCH_NCCL_ASYNC_ERROR_HANDLNG", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        ("cpu", "GLOO_SOCKET_IFNANE", "GLOO_SOCKET_IFNAME"),
        ("cpu", "HCCL_EXEC_TIMOUT", None),  # of no interest without an Ascend
        ("ascend", "HOME", None),
        ("ascend", "HCCL_SOMETHING_ELSE", None),
    ],
)
def test_known_misspellings(device: str, wrong: str, right: str | None) -> None:
    assert misspelt(wrong, device) == right


@pytest.mark.parametrize(
    ("name", "legal", "illegal"),
    [
        ("HCCL_EXEC_TIMEOUT", ["0", "1836", "0.05", "2147483647"], ["-1", "abc", "2147483648", ""]),
        ("HCCL_CONNECT_TIMEOUT", ["120", "7200"], ["119", "7201", "300s"]),
        ("HCCL_RDMA_TIMEOUT", ["5", "20"], ["4", "21"]),
        ("HCCL_HOST_SOCKET_PORT_RANGE", ["auto", "60000", "60000,60050-65535"], ["65536", "60000-99999"]),
        (
            "HCCL_OP_RETRY_PARAMS",
            ["MaxCnt:10,HoldTime:60000,IntervalTime:0", "MaxCnt:3, HoldTime:5000, IntervalTime:1000"],
            ["MaxCnt:11,HoldTime:5000,IntervalTime:0", "MaxCnt:3,HoldTime:60001,IntervalTime:0"],
        ),
        ("HCCL_DETERMINISTIC", ["true", "FALSE", "strict"], ["1", "yes"]),
        ("HCCL_OP_RETRY_ENABLE", ["L0:0, L1:1, L2:1", "L1:1,L2:0"], ["1", "L3:1"]),
        ("HCCL_OP_RETRY_PARAMS", ["MaxCnt:3, HoldTime:5000, IntervalTime:1000"], ["MaxCnt:11"]),
        ("HCCL_NPU_SOCKET_PORT_RANGE", ["auto", "61000-61050", "57000,57005"], ["61000:61050"]),
        ("CPU_AFFINITY_CONF", ["0", "2", "1,npu0:0-1,npu1:2-5", "2,force:1"], ["3", "yes"]),
        ("STREAMS_PER_DEVICE", ["8", "32"], ["16"]),
        ("NPU_ASD_CONFIG", ["enable:true,with_checksum:true,cooldown:5"], ["true"]),
        ("PYTORCH_NPU_ALLOC_CONF", ["expandable_segments:True", "a:[256:1,>:8],b:2"], ["expandable_segments"]),
        ("NCCL_IB_HCA", ["mlx5", "=mlx5_0:1,mlx5_1:1", "^mlx5_3"], ["mlx5 0"]),
        ("CUDA_VISIBLE_DEVICES", ["0,1", "", "GPU-8932f937-d72c"], ["0;1"]),
    ],
)  # fmt: skip
def test_legal_values(name: str, legal: list[str], illegal: list[str]) -> None:
    variable = variables()[name]
    assert [v for v in legal if not variable.legal(v)] == []
    assert [v for v in illegal if variable.legal(v)] == []
    assert variable.expected


def test_unset_and_empty_mean_the_default() -> None:
    assert (
        value_of("HCCL_EVENT_TIMEOUT", {}) == value_of("HCCL_EVENT_TIMEOUT", {"HCCL_EVENT_TIMEOUT": ""}) == "1868"
    )


def test_what_a_run_records() -> None:
    """Every variable that may change what is computed, and no secret."""
    kept = recorded({"HCCL_NEW": "1", "OMP_NUM_THREADS": "2", "RANK": "0", "WANDB_API_KEY": "x", "HOME": "/root"})
    assert kept == {"HCCL_NEW": "1", "OMP_NUM_THREADS": "2", "RANK": "0"}


def test_a_secret_is_not_kept() -> None:
    """NCCL's key would otherwise stand in the run's record, and in what ranks compare."""
    key = "0123456789abcdef0123456789abcdef"
    assert recorded({"NCCL_PSK": key, "NCCL_ALGO": "Ring"}) == {"NCCL_ALGO": "Ring"}
    assert shared({"NCCL_PSK": key, "NCCL_NEW_PSK": key, "NCCL_ALGO": "Ring"}, "cuda") == {"NCCL_ALGO": "Ring"}


def test_what_ranks_must_share() -> None:
    """Addresses and devices of a rank's own may differ; timeouts may not."""
    values = {"HCCL_IF_IP": "10.0.0.1", "HCCL_EXEC_TIMEOUT": "900", "NCCL_ALGO": "Ring", "HCCL_NEW": "1"}
    assert shared(values, "ascend") == {"HCCL_EXEC_TIMEOUT": "900", "HCCL_NEW": "1"}
    assert shared(values, "cpu") == {}
    same_everywhere = {"OMP_NUM_THREADS": "4", "KMP_BLOCKTIME": "0", "TORCH_NEW": "1", "PYTORCH_ALLOC_CONF": "a:1"}
    of_one_machine = {
        "NCCL_SOCKET_IFNAME": "eth7",
        "GLOO_NEW_IFNAME": "eth7",
        "ASCEND_RT_VISIBLE_DEVICES": "0,1",
        "TORCH_HOME": "/data",
        "TORCHELASTIC_ERROR_FILE": "/tmp/a",
        "WANDB_API_KEY": "x",
    }
    for device in ("ascend", "cuda", "cpu"):
        assert shared({**same_everywhere, **of_one_machine}, device) == dict(sorted(same_everywhere.items()))


def test_reading_the_table_needs_no_torch() -> None:
    """The environment is set before torch is imported, so what sets it must not import it."""
    code = "import sys, fullweight.doctor.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
