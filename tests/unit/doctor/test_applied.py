"""The recipe's environment: what is set, what is kept, what is refused, and that every value is a real one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from fullweight.core.errors import ConfigError
from fullweight.doctor.applied import apply_environment, likely_device, vetted, wanted
from fullweight.doctor.config import DeviceConfig
from fullweight.doctor.environment import relevant, variables
from fullweight.doctor.findings import Severity
from fullweight.doctor.rules import check_environment
from fullweight.doctor.settings import Setting


def test_vetted_sets_are_real_and_sound() -> None:
    """Every name and value is legal, has a reason, and the doctor finds nothing but notes in the whole."""
    for name, chosen in vetted().items():
        device, values = chosen["device"], {n: v["value"] for n, v in chosen["variables"].items()}
        assert [n for n, v in values.items() if not relevant(device)[n].legal(v)] == []
        assert all(v["why"] for v in chosen["variables"].values()), name
        for ranks in (1, 16, 2048):
            found = check_environment(values, Setting(device, ranks, group_timeout_seconds=3720))
            assert [f for f in found if f.severity is not Severity.note] == []


def test_exported_values_win_over_the_set_and_lose_to_the_recipe() -> None:
    """The shell's own choice stays, unless the recipe names the variable itself."""
    shell = {"HCCL_EXEC_TIMEOUT": "900", "TASK_QUEUE_ENABLE": "2"}
    config = DeviceConfig(env={"TASK_QUEUE_ENABLE": "1", "HCCL_BUFFSIZE": "400"})
    applied = wanted(config, "ascend", shell)
    assert applied.name == "ascend-910c"
    assert "HCCL_EXEC_TIMEOUT" not in applied.values
    assert applied.values["HCCL_BUFFSIZE"] == "400"
    assert applied.replaced == {"TASK_QUEUE_ENABLE": "2"}
    vetted_values = vetted()["ascend-910c"]["variables"]
    assert applied.values["HCCL_CONNECT_TIMEOUT"] == vetted_values["HCCL_CONNECT_TIMEOUT"]["value"]


def test_another_device_is_left_alone() -> None:
    """A recipe for Ascend sets nothing on a laptop, and only what CUDA reads on CUDA."""
    config = DeviceConfig(environment="ascend-910c", env={"HCCL_BUFFSIZE": "400", "NCCL_ALGO": "Ring"})
    assert wanted(config, "cpu", {}).values == {}
    assert wanted(config, "cuda", {}).values == {"NCCL_ALGO": "Ring"}
    assert wanted(DeviceConfig(environment="none"), "ascend", {}).values == {}


def test_the_two_names_of_the_allocator_never_meet() -> None:
    """torch_npu ends the process when both are set."""
    exported = wanted(DeviceConfig(), "ascend", {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"})
    assert "PYTORCH_ALLOC_CONF" not in exported.values
    own = wanted(DeviceConfig(env={"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}), "ascend", {})
    assert "PYTORCH_ALLOC_CONF" not in own.values
    assert own.values["PYTORCH_NPU_ALLOC_CONF"] == "page_size:1g"


def test_determinism_brings_its_variable() -> None:
    assert wanted(DeviceConfig(), "ascend", {}, deterministic=True).values["HCCL_DETERMINISTIC"] == "true"
    kept = wanted(DeviceConfig(), "ascend", {"HCCL_DETERMINISTIC": "strict"}, deterministic=True)
    assert "HCCL_DETERMINISTIC" not in kept.values


def test_applying_again_takes_back_what_was_applied() -> None:
    """Two recipes in one process do not mix; what the shell had comes back."""
    shell = {"TASK_QUEUE_ENABLE": "2", "HOME": "/root"}
    apply_environment(
        DeviceConfig(env={"TASK_QUEUE_ENABLE": "1"}), "ascend", deterministic=True, environment=shell
    )
    assert shell["TASK_QUEUE_ENABLE"] == "1"
    assert shell["HCCL_DETERMINISTIC"] == "true"
    apply_environment(DeviceConfig(environment="none"), "ascend", environment=shell)
    assert shell == {"TASK_QUEUE_ENABLE": "2", "HOME": "/root"}


def test_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu reads some variables when it is imported; later they would be set in vain."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    with pytest.raises(ConfigError, match="imported already and reads TASK_QUEUE_ENABLE"):
        apply_environment(
            DeviceConfig(environment="none", env={"TASK_QUEUE_ENABLE": "1"}), "ascend", environment={}
        )
    assert variables()["TASK_QUEUE_ENABLE"].at_start
    late = {"HCCL_BUFFSIZE": "400"}  # read when a group is made
    shell: dict[str, str] = {}
    apply_environment(DeviceConfig(environment="none", env=late), "ascend", environment=shell)
    assert shell == late
    apply_environment(DeviceConfig(environment="none"), "ascend", environment=shell)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HCCL_OP_EXTENSION_MODE": "AIV"}, "did you mean 'HCCL_OP_EXPANSION_MODE'"),
        ({"HCCL_EXEC_TIMEOUT": "30m"}, "a number from 0 to 2147483647"),
        ({"LD_PRELOAD": "x.so"}, "export it in the shell"),
        ({"OMP_NUM_THREADS": "4"}, "export it in the shell"),
    ],
)
def test_variables_that_a_recipe_may_not_set(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeviceConfig.resolve({"env": env})


def test_the_device_is_guessed_from_its_files(tmp_path: Path) -> None:
    """Without loading anyone's software; a name that is given is taken."""
    assert likely_device("ascend") == "ascend"
    assert likely_device("auto", tmp_path) == "cpu"
    (tmp_path / "davinci_manager").touch()
    assert likely_device("auto", tmp_path) == "cpu"
    (tmp_path / "nvidia0").touch()
    assert likely_device("auto", tmp_path) == "cuda"
    assert likely_device("auto", tmp_path / "none") == "cpu"
