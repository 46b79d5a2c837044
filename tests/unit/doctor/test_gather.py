"""Reading a machine: versions from the vendors' files, ports from the kernel's tables, this machine as it is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from fullweight.devices import MemoryUse, Topology, find
from fullweight.devices.ascend import Ascend
from fullweight.doctor import gather
from fullweight.doctor.compare import check_job
from fullweight.doctor.examine import Wish, glance, job_of
from fullweight.doctor.findings import Severity, blocking, refusal


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=9.1.0\n", "9.1.0"),
        ("ascend_toolkit_install.info", "version=8.5.0\n", "8.5.0"),
        ("version.info", "Version=9.0.0-beta.2\n", "9.0.0-beta.2"),
        ("version.info", "nothing said\n", None),
    ],
)
def test_version_of_cann(tmp_path: Path, place: str, text: str, expected: str | None) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert gather.cann_version({"ASCEND_HOME_PATH": str(tmp_path)}) == expected
    assert gather.cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == expected
    assert gather.cann_version({}) is None
    assert gather.cann_version({"ASCEND_HOME_PATH": str(tmp_path / "none")}) is None


def test_versions_of_drivers(tmp_path: Path) -> None:
    ascend, nvidia = tmp_path / "version.info", tmp_path / "version"
    ascend.write_text("Version=25.5.1\nascendhal_version=7.35.23\naicpu_version=1.0\n")
    nvidia.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert gather.ascend_driver(ascend) == "25.5.1"
    assert gather.nvidia_driver(nvidia) == "580.95.05"
    assert gather.ascend_driver(tmp_path / "none") is None
    assert gather.nvidia_driver(tmp_path / "none") is None


def test_ports_are_read_from_the_kernels_table(tmp_path: Path) -> None:
    """In use whether listening or connected; other ports, and a table that is not there, are passed over."""
    table = tmp_path / "tcp"
    lines = [
        "  sl  local_address rem_address   st",
        "   0: 0100007F:EA63 00000000:0000 0A 0",
        "   1: 0100007F:1F90 x 0A 0",
    ]
    table.write_text("\n".join(lines) + "\n")
    assert gather.ports_in_use(range(60000, 60032), [table, tmp_path / "tcp6"]) == (60003,)


def test_a_port_of_ours_is_seen() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert gather.ports_in_use(range(port, port + 1)) == (port,)


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of a machine without accelerator; a misspelt variable is kept, a secret is not."""
    monkeypatch.setenv("GLOO_SOCKET_IFNANE", "eth0")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = gather.gather_facts("cpu", find("cpu"), run_folder=tmp_path / "not" / "yet")
    assert found.devices.count == 1
    assert found.host.run_folder_free_bytes > 0
    assert found.host.cores >= 1
    assert found.environment["GLOO_SOCKET_IFNANE"] == "eth0"
    assert "secret" not in found.model_dump_json()


def test_a_device_that_cannot_be_used_still_has_facts(tmp_path: Path) -> None:
    """No torch_npu, no driver: the doctor must be able to say so."""
    found = gather.gather_facts("ascend", None, run_folder=tmp_path)
    assert found.device == "ascend"
    assert found.devices.count == 0
    assert found.versions.torch_required == "2.13.0"


class Dies(Ascend):
    """Sixteen dies of a 910C, or of another chip, as torch_npu would tell of them."""

    def __init__(self, chip: str, link: str = "HCCS") -> None:
        self.name_of_chip, self.link = chip, link

    def count(self) -> int:
        return 16

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def chip(self) -> str:
        return self.name_of_chip

    def memory(self) -> MemoryUse:
        return MemoryUse(0, 0, 0, 1 << 36, 1 << 36)

    def topology(self) -> Topology:
        assert os.environ["LOCAL_RANK"] == "0", "one rank of a machine asks the vendor's tool"
        links = [["X" if i == j else "HCCS" for j in range(16)] for i in range(16)]
        links[3][7] = links[7][3] = self.link
        return Topology(16, 2, 1 << 36, tuple(map(tuple, links)))


def test_a_run_sees_a_missing_die_and_mixed_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what it looks at before it starts (`train/ready.py`)."""
    monkeypatch.setattr(gather, "_present", lambda name: 15 if name == "ascend" else None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    wish, machines = Wish(device="ascend"), []
    for rank, chip in enumerate(("Ascend910_9391", "Ascend910_9391", "Ascend910B2")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        machines.append(glance(wish, Dies(chip)))
    errors = {f.name: f.where for f in check_job(job_of(wish, machines)) if f.severity is Severity.error}
    assert {"dies", "chips"} <= errors.keys()
    assert errors["dies"].startswith("rank 0 on ")
    assert errors["chips"].startswith("rank 2 on ")


def test_a_run_sees_a_link_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops the start, naming what to accept to go on all the same; healthy links say nothing."""
    monkeypatch.setattr(gather, "_present", lambda name: 16 if name == "ascend" else None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    for link, expected in (("HCCS", 0), ("PHB", 1)):
        machines = []
        for rank in range(2):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            machines.append(glance(Wish(device="ascend"), Dies("Ascend910_9391", link)))
        job = job_of(Wish(device="ascend"), machines)
        stops = [f for f in blocking(check_job(job), ()) if f.name == "links"]
        assert len(stops) == expected
        assert not [f for f in blocking(check_job(job), ("links",)) if f.name == "links"]
    assert "3-7 PHB" in stops[0].found
    assert 'device.accept = ["links"]' in refusal(stops)
