"""What vendors' tools print, read from recorded output; and what is said where a device is not to be had."""

from __future__ import annotations

import importlib.machinery
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch

from fullweight.core.errors import ConfigError
from fullweight.devices import DEVICES, DeviceName, find, of
from fullweight.devices import ascend as ascend_module
from fullweight.devices import cpu as cpu_module
from fullweight.devices.ascend import Ascend, chip_watts, dies_watts
from fullweight.devices.base import links_of, tool, visible
from fullweight.devices.cpu import Cpu, energy_joules
from fullweight.devices.cuda import Cuda, power_draw

# As npu-smi 25.2.0 prints the first two chips of an A3 node, two dies each.
TWO_DIES = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 211.3       43                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 7           0    / 0          61609/ 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           44                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 7           0    / 0          61625/ 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | OK            | 210.6       45                0    / 0             |
| 0     2                   | 0000:99:00.0  | 7           0    / 0          61616/ 65536         |
+------------------------------------------------------------------------------------------------+
| 1     Ascend910           | OK            | -           45                0    / 0             |
| 1     3                   | 0000:9B:00.0  | 7           0    / 0          61616/ 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 100           | python                   | 111                     |
+===========================+===============+====================================================+
"""
# An A2 node: one die a chip, whose second line has no physical number. The second chip's power cannot be read.
ONE_DIE = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 92.4        36                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
| 10    910B3               | OK            | -           36                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
"""
# The shapes of the two tools' matrices of links: four dies of an A3 node, three GPUs with a network card.
DIES = """\
           Phy-ID0    Phy-ID1    Phy-ID2    Phy-ID3    CPU Affinity
Phy-ID0    X          SIO        HCCS_SW    HCCS_SW    0-79
Phy-ID1    SIO        X          HCCS_SW    HCCS_SW    0-79
Phy-ID2    HCCS_SW    HCCS_SW    X          SIO        80-159
Phy-ID3    HCCS_SW    HCCS_SW    SIO        X          80-159

Legend:

  X    = Self
  SIO  = two dies of one chip
"""
GPUS = (
    "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV18\tNV18\tPIX\t44-51,148-155\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tNV18\tNODE\t\t1\t\tN/A\n"
    "GPU2\tNV18\tNV18\t X \tSYS\t\t1\t\tN/A\n"
    "NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n"
)


def test_power_of_dies_adds_up_to_their_chips() -> None:
    """Each die has half of its chip's reading, whether it is the first or the second."""
    watts = [chip_watts(TWO_DIES, number) for number in range(4)]
    assert watts == [211.3 / 2, 211.3 / 2, 210.6 / 2, 210.6 / 2]
    assert chip_watts(TWO_DIES, 4) is None
    assert dies_watts(TWO_DIES, range(4)) == pytest.approx(211.3 + 210.6)
    assert dies_watts(TWO_DIES, [1, 2]) == pytest.approx((211.3 + 210.6) / 2)
    assert dies_watts(TWO_DIES, [0, 4]) is None, "a part is not a guess at all"


def test_one_rank_of_a_machine_asks_for_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reading is of all dies of the machine's ranks; the others add nothing and start no tool."""
    asked = []
    monkeypatch.setattr(ascend_module, "tool", lambda *command: asked.append(command) or TWO_DIES)
    monkeypatch.setattr(Ascend, "_numbers", lambda _self: [0, 1, 2, 3])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    told = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        meter = Ascend().power_meter()
        meter.begin()
        while rank == 0 and meter.watts() is None:  # the thread reads at once
            time.sleep(0.01)
        told.append(meter.watts())
        meter.close()
    assert told == [pytest.approx(211.3 + 210.6 / 2), 0.0, 0.0]
    assert asked == [("npu-smi", "info")]


def test_power_of_a_chip_with_one_die() -> None:
    """The chip's own; a dash, no table and no tool are unknown."""
    assert chip_watts(ONE_DIE, 0) == 92.4
    assert chip_watts(ONE_DIE, 10) is None
    assert chip_watts("no driver", 0) is None
    assert chip_watts(None, 0) is None


def test_power_of_a_gpu() -> None:
    """A number, or unknown."""
    assert power_draw("411.20\n") == 411.2
    assert [power_draw(text) for text in ("[N/A]\n", "", None, "No devices were found\n")] == [None] * 4


def test_power_of_a_cpu_counts_packages_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of two packages, one of which begins anew between the readings; their parts are in them already."""

    def write(*microjoules: int) -> None:
        names = ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")
        for name, counted in zip(names, microjoules, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{counted}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")

    write(1_000_000, 9_000_000, 500)
    monkeypatch.setattr(cpu_module, "_POWERCAP", tmp_path)
    clock = iter([100.0, 100.5])
    waiting = SimpleNamespace(
        sleep=lambda _seconds: write(3_000_000, 2_000_000, 600), perf_counter=lambda: next(clock)
    )
    monkeypatch.setattr(cpu_module, "time", waiting)
    assert Cpu().watts() == pytest.approx((2.0 + 3.0) / 0.5)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as where only root may read it
    assert energy_joules(tmp_path) is None
    assert energy_joules(tmp_path / "absent") is None


def test_links_of_the_devices_that_are_visible() -> None:
    """Rows and columns by the tool's numbers, in the process's order; a device that the matrix lacks: unknown."""
    assert links_of(DIES, "Phy-ID", [0, 1, 2]) == (
        ("X", "SIO", "HCCS_SW"),
        ("SIO", "X", "HCCS_SW"),
        ("HCCS_SW", "HCCS_SW", "X"),
    )
    assert links_of(GPUS, "GPU", [2, 0]) == (("X", "NV18"), ("NV18", "X"))
    assert links_of(DIES, "Phy-ID", [0, 4]) is None
    assert links_of("", "GPU", [0]) is None


def test_the_machines_numbers_of_visible_devices() -> None:
    """From the variable; names that are no numbers (UUIDs) leave the order unknown, and the plain one is taken."""
    assert visible("6,7", 2) == [6, 7]
    assert visible(None, 3) == visible("", 3) == [0, 1, 2]


def test_a_tool_that_is_absent_or_fails_says_nothing() -> None:
    """Nothing is guessed from half an output."""
    assert tool("no-such-vendor-smi") is None
    assert tool("false") is None
    assert tool("echo", "12") == "12\n"


def test_backends_serve_host_and_device() -> None:
    """Collectives of host tensors go through gloo everywhere."""
    assert Cuda().backend() == "cpu:gloo,cuda:nccl"
    assert Cpu().backend() == "gloo"


def test_a_tensors_device_finds_its_contract() -> None:
    """By torch's name of the type, which torch itself has for these two."""
    assert [of(torch.device(name)).name for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert {kind.type for kind in DEVICES.values()} == {"cpu", "cuda", "npu"}
    assert set(get_args(DeviceName)) == {"auto", *DEVICES}, "recipes name what there is"


def test_an_absent_vendor_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, installed but without CANN, installed and without a chip: each says so, and auto goes on."""
    monkeypatch.setattr(ascend_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"'ascend' .*not installed \(pip install torch_npu"):
        find("ascend")
    monkeypatch.setattr(ascend_module.importlib.util, "find_spec", lambda _name: object())

    def without_cann(_name: str) -> ModuleType:
        raise ImportError("libhccl.so: cannot open shared object file\nsecond line")

    monkeypatch.setattr(ascend_module.importlib, "import_module", without_cann)
    with pytest.raises(
        ConfigError, match=r"\(libhccl\.so: cannot open shared object file\); install CANN"
    ) as caught:
        find("ascend")
    assert "\n" not in str(caught.value)
    chips = SimpleNamespace(npu=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(ascend_module.importlib, "import_module", lambda _name: chips)
    with pytest.raises(ConfigError, match="sees no NPU"):
        find("ascend")
    assert find("auto").name != "ascend"
    with pytest.raises(ConfigError, match="'ascend'"):
        find("ascnd")


@pytest.fixture
def two_dies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A torch_npu with two dies; returns those that were made current."""
    chosen: list[int] = []
    npu = SimpleNamespace(device_count=lambda: 2, set_device=chosen.append, is_available=lambda: True)
    package = ModuleType("torch_npu")
    package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    package.npu = npu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    # torch itself knows the type only once the real package is imported
    monkeypatch.setattr(ascend_module, "torch", SimpleNamespace(device=lambda kind, index: (kind, index)))
    return chosen


def test_operations_must_not_run_on_the_cpu_unseen(monkeypatch: pytest.MonkeyPatch, two_dies: list[int]) -> None:
    """Refused unless the variable is as the package sets it, or its opposite is said to be meant."""
    monkeypatch.delenv("FULLWEIGHT_ALLOW_CPU_FALLBACK", raising=False)
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "0")
    with pytest.raises(ConfigError, match=r"TORCH_NPU_FALLBACK_CPU_DISABLE=0 .*FULLWEIGHT_ALLOW_CPU_FALLBACK=1"):
        Ascend().device(1)
    assert two_dies == []
    monkeypatch.setenv("FULLWEIGHT_ALLOW_CPU_FALLBACK", "1")
    assert Ascend().device(0) == ("npu", 0)
    monkeypatch.delenv("FULLWEIGHT_ALLOW_CPU_FALLBACK")
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    Ascend().device(1)
    assert two_dies == [0, 1]
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2 and this process sees 2 NPU"):
        Ascend().device(2)


def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ranks on a machine than it has devices, or than are visible."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Cuda().device(1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2 and this process sees 2 CUDA device"):
        Cuda().device(2)
    assert chosen == [1]
