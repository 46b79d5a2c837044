"""A whole training step on tensors without data of device npu, with the Ascend operations.

What a device or its operations cannot change is compared with the same rehearsal on the CPU's: this rank's part of
the weights and gradients, and every collective, its axis, count and bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fullweight.rehearse.run import roles_of
from fullweight.train.config import RunConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def rehearse(folder: Path, recipe: str, ranks: int, device: str, *arguments: str) -> dict[str, Any]:
    """What the command writes, from a process of its own: tests before may have woken the devices that are not."""
    target = folder / f"{device}.json"
    command = [sys.executable, "-m", "fullweight", "rehearse", str(RECIPES / recipe), "--ranks", str(ranks)]
    command += ["--device", device, "--processes", "1", "--json", str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode in {0, 2}, done.stderr  # 2: more than the chip has
    return json.loads(target.read_text(encoding="utf-8"))


def last_role(folder: Path, recipe: str, ranks: int, device: str, operations: str) -> dict[str, Any]:
    """The last pipeline stage: layers with every kind of attention, the MTP block, the head and the loss."""
    layout = RunConfig.from_toml(RECIPES / recipe, []).layout(ranks)
    arguments = ("--role", roles_of(layout)[-1].name, "--ops", operations)
    (role,) = rehearse(folder, recipe, ranks, device, *arguments)["roles"]
    return role


def collectives(role: dict[str, Any]) -> list[tuple[object, ...]]:
    return sorted((e["axis"], e["kind"], e["module"], e["count"], e["num_bytes"]) for e in role["exchanges"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [512, 1024])
def test_a_step_of_pro(tmp_path: Path, ranks: int) -> None:
    recipe = f"v4_pro_sft_910c_{ranks}.toml"
    found = last_role(tmp_path, recipe, ranks, "npu", "ascend")
    assert found["peak_bytes"] > 2**30
    for operator in ("npu.npu_grouped_matmul", "npu.npu_sparse_flash_attention_grad", "aten.matmul"):
        assert found["flops_by_operation"][operator] > 0
    if ranks == 512:
        expected = last_role(tmp_path, recipe, ranks, "cpu", "cpu")
        assert found["num_parameters"] == expected["num_parameters"]
        assert found["peak_by_category"]["parameters"] == expected["peak_by_category"]["parameters"]
        assert collectives(found) == collectives(expected)


def test_the_command(tmp_path: Path) -> None:
    """Of a small model, whose heads the operators do not take: "auto" leaves these to the reference."""
    settings = ("--set", "parallel.expert=2", "--set", "train.rows_per_step=4")
    results = {device: rehearse(tmp_path, "tiny_smoke.toml", 4, device, *settings) for device in ("npu", "cpu")}
    assert results["npu"]["operations"] == "auto, on npu"
    npu, cpu = (results[device]["roles"][0] for device in ("npu", "cpu"))
    assert npu["exchanges"] == cpu["exchanges"]
    assert npu["num_parameters"] == cpu["num_parameters"]


def test_operations_that_do_not_take_the_model_say_so() -> None:
    command = [sys.executable, "-m", "fullweight", "rehearse", str(RECIPES / "tiny_smoke.toml"), "--ranks", "1"]
    command += ["--device", "npu", "--ops", "ascend"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 1
    assert 'set ops.attention = "reference"' in done.stderr.replace("\n", " ")
