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

import pytest

from fullweight.rehearse.result import RoleResult
from fullweight.rehearse.role import Assignment, trace
from fullweight.rehearse.routing import Routing
from fullweight.rehearse.run import roles_of
from fullweight.train.config import RunConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def last_role(recipe: str, ranks: int, device: str, operations: str) -> RoleResult:
    """The last pipeline stage: layers with every kind of attention, the MTP block, the head and the loss."""
    config = RunConfig.from_toml(RECIPES / recipe, [f"ops.default={operations}"])
    layout = config.layout(ranks)
    role = roles_of(layout)[-1]
    least = layout.pipeline  # a pipeline needs as many rows as it has ranks
    return trace(Assignment(config, role.name, role.rank, ranks, role.num_ranks, least, least, Routing(), device))


def collectives(result: RoleResult) -> list[tuple[object, ...]]:
    return sorted((e.axis, e.kind, e.module, e.count, e.num_bytes) for e in result.exchanges)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [512, 1024])
def test_a_step_of_pro(ranks: int) -> None:
    found = last_role(f"v4_pro_sft_910c_{ranks}.toml", ranks, "npu", "ascend")
    assert found.peak_bytes > 2**30
    for operator in ("npu.npu_grouped_matmul", "npu.npu_sparse_flash_attention_grad", "aten.matmul"):
        assert found.flops_by_operation[operator] > 0
    if ranks == 512:
        expected = last_role(f"v4_pro_sft_910c_{ranks}.toml", ranks, "cpu", "cpu")
        assert found.num_parameters == expected.num_parameters
        assert found.peak_by_category["parameters"] == expected.peak_by_category["parameters"]
        assert collectives(found) == collectives(expected)


def test_the_command(tmp_path: Path) -> None:
    """Of a small model, whose heads the operators do not take: "auto" leaves these to the reference."""
    results = {}
    for device in ("npu", "cpu"):
        target = tmp_path / f"{device}.json"
        arguments = ["--ranks", "4", "--device", device, "--json", str(target), "--processes", "1"]
        settings = ["--set", "parallel.expert=2", "--set", "train.rows_per_step=4"]
        command = [sys.executable, "-m", "fullweight", "rehearse", str(RECIPES / "tiny_smoke.toml")]
        done = subprocess.run(
            [*command, *arguments, *settings], capture_output=True, text=True, env=os.environ, check=False
        )
        assert done.returncode == 0, done.stderr
        results[device] = json.loads(target.read_text(encoding="utf-8"))
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
