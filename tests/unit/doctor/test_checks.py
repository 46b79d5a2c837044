"""Constructed machines: each fault is named, with its weight, and a healthy node has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.errors import ConfigError
from fullweight.doctor.compare import check_job
from fullweight.doctor.examine import UNWISE, status_of
from fullweight.doctor.facts import Facts, Job
from fullweight.doctor.findings import Severity

from .machines import ASCEND, CPU, CUDA, GB, LINKS_910C, facts, job

TWO_TYPES = ("Ascend910_9391",) * 15 + ("Ascend910B2",)
BROKEN_LINKS = (("X", "NV18", "NV18"), ("NV18", "X", "SYS"), ("NV18", "SYS", "X"))
NO_TORCH_NPU = {"hardware": {"ascend": 16}, "absent": {"ascend": "torch_npu is not installed"}}
BAD_OPERATION = {"operation": "attention", "dtype": "bf16", "error": 0.3, "gradient_error": 0.1, "tolerance": 0.03}

# (node, changes, {name: severity} of errors and warnings)
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = [
    (ASCEND, {}, {}),
    (CUDA, {}, {}),
    (CPU, {}, {}),
    # software
    (ASCEND, {"versions": {"driver": None}}, {"driver": "error"}),
    (ASCEND, {"versions": {"cann": None}}, {"cann": "error"}),
    (ASCEND, {"versions": {"cann": "8.2.RC1"}}, {"cann": "error"}),
    (ASCEND, {"versions": {"cann": "9.0.1"}}, {"cann": "warning"}),
    (ASCEND, {"versions": {"cann": "9.1.0"}}, {"cann": "warning"}),
    (ASCEND, {"versions": {"cann": "9.1.0", "driver": "25.0.RC1"}}, {"cann": "warning", "driver": "error"}),
    (ASCEND, {"versions": {"driver": "27.3.0"}}, {"driver": "warning"}),
    (ASCEND, {"versions": {"driver": "26.1.0"}}, {"driver": "warning"}),  # unnamed for CANN 9.2: unknown
    (ASCEND, {"versions": {"npu_torch": None}}, {"torch_npu": "error"}),
    (ASCEND, {"versions": {"npu_torch": "2.12.0"}}, {"torch_npu": "error"}),
    (ASCEND, {"versions": {"torch": "2.14.0", "npu_torch": "2.14.0"}},
     {"torch": "warning", "torch_npu": "warning"}),
    (ASCEND, {"versions": {"python": "3.9.2"}}, {"python": "error"}),
    (ASCEND, {"versions": {"torch_cuda": "13.0"}}, {"torch": "warning"}),
    (CUDA, {"versions": {"torch_cuda": None}}, {"torch": "error"}),
    (CUDA, {"versions": {"driver": None}}, {"driver": "error"}),
    (CUDA, {"versions": {"driver": "570.86.10"}}, {"driver": "error"}),
    (CPU, {"versions": {"torch": "2.12.1+cpu"}}, {"torch": "warning"}),
    # devices
    (ASCEND, {"devices": {"count": 0, "chips": (), "memory_bytes": (), "visible": (), "present": None},
              "absent": {"ascend": "torch_npu sees no NPU"}}, {"devices": "error"}),
    (ASCEND, {"devices": {"count": 15, "present": 15, "visible": tuple(range(15))}},
     {"devices": "error", "dies": "error"}),
    (ASCEND, {"local_size": 2, "devices": {"count": 2, "visible": (3, 4)}}, {"dies": "warning"}),
    (ASCEND, {"local_size": 2, "devices": {"count": 2, "visible": (4, 5)}}, {}),
    (ASCEND, {"devices": {"chips": TWO_TYPES}}, {"chips": "error"}),
    (ASCEND, {"devices": {"memory_bytes": (64 * GB,) * 15 + (60 * GB,)}}, {"memory": "warning"}),
    (CUDA, {"local_size": 3, "devices": {"count": 3, "links": BROKEN_LINKS}}, {"links": "warning"}),
    (ASCEND, {"devices": {"links": tuple(("HCCS",) * 16 for _ in range(16))}}, {}),
    (CPU, NO_TORCH_NPU, {}),  # a note: see below
    (CPU, {**NO_TORCH_NPU, "asked": "cpu"}, {}),
    # host
    (ASCEND, {"host": {"open_files": 1024}}, {"open-files": "warning"}),
    (ASCEND, {"host": {"cores": 16}}, {"cores": "warning"}),
    (CUDA, {"host": {"shared_memory_free_bytes": 64 * 10**6}}, {"shared-memory": "warning"}),
    # what the self-tests said
    (ASCEND, {"operations": (BAD_OPERATION,)}, {"operation attention (bf16)": "error"}),
    (ASCEND, {"operations": ({**BAD_OPERATION, "error": 0.004, "gradient_error": 0.01},)}, {}),
    (CUDA, {"operations": ({**BAD_OPERATION, "failure": "no kernel"},)}, {"operation attention (bf16)": "error"}),
]  # fmt: skip


def weighty(found: Job) -> dict[str, str]:
    return {f.name: str(f.severity) for f in check_job(found) if f.severity is not Severity.note}


@pytest.mark.parametrize(("node", "changes", "expected"), CASES)
def test_constructed_machines(node: dict[str, Any], changes: dict[str, Any], expected: dict[str, str]) -> None:
    """Errors and warnings are exactly the expected ones."""
    assert weighty(job(facts(node, **changes))) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"host": {"ports_in_use": (60003,)}}, {"HCCL_IF_BASE_PORT": "error"}),
        ({"host": {"ports_in_use": (60003,)}, "environment": {"HCCL_IF_BASE_PORT": "50000"}}, {}),
        ({"host": {"reserved_ports": ""}}, {}),  # a note
        ({"environment": {"HCCL_SOCKET_IFNAME": "enp67"}}, {}),
        ({"environment": {"HCCL_SOCKET_IFNAME": "=enp67"}}, {"HCCL_SOCKET_IFNAME": "error"}),
        ({"environment": {"HCCL_SOCKET_IFNAME": "^docker"}}, {}),
        ({"environment": {"GLOO_SOCKET_IFNAME": "enp67"}}, {"GLOO_SOCKET_IFNAME": "error"}),
        ({"environment": {"INF_NAN_MODE_ENABLE": "0"}}, {"INF_NAN_MODE_ENABLE": "error"}),
    ],
)
def test_what_matters_between_ranks(changes: dict[str, Any], expected: dict[str, str]) -> None:
    """Ports and interfaces count when there are others to meet; the same on both ranks is said once."""
    both = [facts(ASCEND, **changes, rank=rank) for rank in (0, 1)]
    assert weighty(job(*both)) == expected
    assert len([f for f in check_job(job(*both)) if f.name in expected]) == len(expected)


@pytest.mark.parametrize(
    ("changes", "name", "severity"),
    [
        ({"versions": {"torch": "2.13.1+cpu"}}, "torch", "error"),
        ({"versions": {"cann": "9.2.1"}}, "cann", "error"),
        ({"versions": {"driver": "26.2.0"}}, "driver", "warning"),
        ({"devices": {"chips": ("Ascend910B2",) * 16}}, "chips", "error"),
        ({"devices": {"count": 14}}, "devices", "error"),
        ({"devices": {"memory_bytes": (60 * GB,) * 16}}, "memory", "warning"),
        ({"environment": {"HCCL_BUFFSIZE": "400"}}, "HCCL_BUFFSIZE", "error"),
        ({"environment": {"OMP_NUM_THREADS": "3"}}, "OMP_NUM_THREADS", "warning"),
        ({"operations_set": "reference"}, "operations", "error"),
        ({"clock_offset_seconds": -95.0, "clock_uncertainty_seconds": 0.001}, "clock", "warning"),
    ],
)
def test_a_machine_that_differs_is_named(changes: dict[str, Any], name: str, severity: str) -> None:
    """The rank, its value and what most have."""
    machines = [facts(ASCEND, rank=rank, host_name=f"node{rank}") for rank in range(3)]
    odd = facts(ASCEND, rank=3, host_name="node3", **changes)
    found = [f for f in check_job(job(*machines, odd)) if f.name == name and f.severity is not Severity.note]
    assert str(found[0].severity) == severity
    assert "rank 3 on node3" in found[0].where
    assert "rank 2" not in found[0].where


def test_an_accelerator_that_cannot_be_used() -> None:
    """A job of several ranks does not slip onto the CPU unseen; a run of one rank is only told."""
    alone, both = [facts(CPU, **NO_TORCH_NPU)], [facts(CPU, **NO_TORCH_NPU, rank=r) for r in (0, 1)]
    assert [str(f.severity) for f in check_job(job(*alone)) if f.name == "devices"] == ["note"]
    assert weighty(job(*both)) == {"devices": "warning"}


def test_versions_that_no_table_names_are_unknown() -> None:
    """Which is said, and is not compatible."""
    newer = {"torch": "2.14.0", "npu_torch": "2.14.0", "cann": "9.3.0"}
    for versions in ({"driver": "26.1.0"}, newer):
        found = check_job(job(facts(ASCEND, versions=versions)))
        assert ["unknown whether" in f.found for f in found if f.name == "driver"] == [True]


def test_clocks_that_agree_say_nothing() -> None:
    """An offset within its uncertainty is none."""
    odd = facts(ASCEND, rank=1, clock_offset_seconds=12.0, clock_uncertainty_seconds=3.0)
    assert weighty(job(facts(ASCEND), odd)) == {}


def test_disk_for_the_recipe() -> None:
    """Too little is an error only when the recipe says how much it needs."""
    node = facts(ASCEND, host={"run_folder_free_bytes": 100 * GB})
    assert weighty(job(node)) == {}
    assert weighty(job(node, needed_disk_bytes=101 * GB)) == {"disk": "error"}


def test_collectives_that_are_wrong() -> None:
    right = {"collective": "all_reduce", "device": "npu", "message_bytes": 4, "correct": True}
    wrong = {**right, "collective": "all_to_all", "correct": False, "failure": "wrong values on rank(s) [1]"}
    node = facts(ASCEND)
    assert weighty(job(node, collectives=(right,))) == {}
    assert weighty(job(node, collectives=(right, wrong))) == {"collective all_to_all (npu)": "error"}


def test_exit_statuses() -> None:
    """Errors, unwise things, and unwise things that are accepted."""
    slow = facts(ASCEND, environment={"ASCEND_LAUNCH_BLOCKING": "1"})
    for machine, accept, status in (
        (facts(ASCEND), (), 0),
        (slow, (), UNWISE),
        (slow, ("ASCEND_LAUNCH_BLOCKING",), 0),
        (facts(ASCEND, versions={"driver": None}), ("driver",), 1),
    ):
        one = job(machine, accept=accept)
        assert status_of(one, check_job(one)) == status


def test_facts_survive_their_file(tmp_path: Path) -> None:
    """What --json writes is what --facts reads, and gives the same findings."""
    written = job(facts(ASCEND, rank=0), facts(ASCEND, rank=1, versions={"cann": "9.0.0"}), deterministic=True)
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({**written.as_dict(), "findings": []}))
    read = Job.read(path)
    assert read == written
    assert check_job(read) == check_job(written)
    assert read.machines[0].devices.links == LINKS_910C


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "has no format"),
        ('{"format": "other"}', "has no format"),
        ('{"format": "fullweight-doctor-1", "ranks": 1, "machines": []}', "machines"),
        ('{"format": "fullweight-doctor-1", "ranks": 1, "machines": [{"device": "tpu"}]}', "device"),
    ],
)
def test_files_that_are_no_facts(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "facts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Job.read(path)


def test_every_field_of_facts_has_a_use() -> None:
    """A healthy node as JSON and back: nothing that cannot be sent."""
    assert Facts.model_validate_json(facts(CUDA).model_dump_json()) == facts(CUDA)
