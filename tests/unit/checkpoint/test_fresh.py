"""`init` writes what a model in memory would export, bit for bit, without there being such a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.allocations import Allocations

from fullweight.checkpoint.fresh import payload_bytes, write_fresh
from fullweight.checkpoint.hf import export_checkpoint
from fullweight.core import machine
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.models.deepseek_v4 import init
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

# Numbers that no chunk divides, three experts' stacks, and every kind of block.
ODD = {"hidden_size": 72, "moe_intermediate_size": 40, "n_routed_experts": 3, "vocab_size": 307}


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
@pytest.mark.parametrize("drawn_bytes", [1, 3000, 2**25])
def test_streamed_weights_are_those_of_a_model_in_memory(
    form: str, drawn_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file the same, byte for byte, however few numbers are drawn at once; receipts differ in the origin."""
    config = DeepSeekV4Config.preset("tiny", **ODD)
    expected = export_checkpoint(initialise(DeepSeekV4(config, ops="reference"), 5), tmp_path / "whole", form)
    monkeypatch.setattr(init, "_DRAWN_BYTES", drawn_bytes)
    told: list[int] = []
    write_fresh(config, tmp_path / "streamed", form, 5, lambda _name, count: told.append(count))
    files = sorted(p.name for p in expected.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "streamed").iterdir())
    for name in files:
        one, two = (tmp_path / "streamed" / name).read_bytes(), (expected / name).read_bytes()
        if name == "receipt.json":
            values = json.loads(one)
            assert values.pop("origin") == "fresh weights, seed 5"
            assert values == {k: v for k, v in json.loads(two).items() if k != "origin"}
        else:
            assert one == two, name
    assert sum(told) == payload_bytes(config, tmp_path, form)


def test_a_model_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """Never more than two of the largest tensors at once, of a model of many times that."""
    config = DeepSeekV4Config.preset("small", n_routed_experts=32)
    with Allocations() as counted:
        write_fresh(config, tmp_path / "out", "bfloat16", 0)
    stack = config.n_routed_experts * 2 * config.moe_intermediate_size * config.hidden_size * 4
    assert 0 < counted.peak <= 2 * stack
    assert config.num_parameters(mtp=True) * 4 > 8 * stack


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Also where so many tensors could not even be listed."""
    tiny = DeepSeekV4Config.preset("tiny")
    usage = machine.shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(ConfigError, match=r"522,092 parameters in bfloat16 needs up to .* MB"):
            write_fresh(tiny, tmp_path / "out", "bfloat16", 0)
        with pytest.raises(ConfigError, match=r"needs up to 3,197\.7 GB"):
            write_fresh(DeepSeekV4Config.preset("pro"), tmp_path / "out", "bfloat16", 0)
    assert not list(tmp_path.iterdir())


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    """An error of the disk in the last file takes the earlier ones with it."""
    config = DeepSeekV4Config.preset("tiny")
    total, done = payload_bytes(config, tmp_path, "bfloat16"), 0

    def fail_late(_name: str, count: int) -> None:
        nonlocal done
        done += count
        if done > 0.9 * total:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_fresh(config, tmp_path / "out", "bfloat16", 0, fail_late)
    assert not list(tmp_path.iterdir())
