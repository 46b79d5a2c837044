"""A whole training step on tensors without data of device npu, with the Ascend operations.

What a device or its operations cannot change is compared with the same rehearsal on the CPU's: this rank's part of
the weights and gradients, and every collective, its axis, count and bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
    command += ["--device", device, "--json", str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode in {0, 2}, done.stderr  # 2: more than the chip has
    return json.loads(target.read_text(encoding="utf-8"))


def collectives(role: dict[str, Any]) -> list[tuple[object, ...]]:
    return sorted((e["axis"], e["kind"], e["module"], e["count"], e["num_bytes"]) for e in role["exchanges"])


def kinds_of_stages(config: RunConfig, ranks: int) -> dict[str, int]:
    """The first role of each kind, and how many do its work: in stages of the same layers, without embedding and
    head, only fewer micro-batches are in flight than in the first of them (`rehearse/run.py`)."""
    architecture, layout = config.model.architecture(), config.layout(ranks)
    roles = [role.name for role in roles_of(layout)]
    if layout.pipeline == 1:
        return dict.fromkeys(roles, 1)
    kinds: dict[tuple[object, ...], str] = {}
    counts: dict[str, int] = {}
    sizes = config.parallel.stage_layers
    assert sizes is not None
    for stage, (role, size) in enumerate(zip(roles, sizes, strict=True)):
        layers = range(sum(sizes[:stage]), sum(sizes[: stage + 1]))
        ends = (stage == 0, stage == len(sizes) - 1)
        ratios = sorted((architecture.compress_ratios[i], architecture.is_hash_layer(i)) for i in layers)
        first = kinds.setdefault((*ends, size, *ratios), role)
        counts[first] = counts.get(first, 0) + 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks", "every"),
    [
        ("v4_pro_sft_910c_512", 512, True),
        ("v4_pro_sft_910c_1024", 1024, False),
        ("v4_pro_sft_context_910c_1024", 1024, False),
    ],
)
def test_a_step_of_pro(tmp_path: Path, recipe: str, ranks: int, every: bool) -> None:
    """From the embedding's stage to the loss's, each role, or each kind of them, fits its die; together they do
    the model's work. Continued pre-training has the same shapes (tests/unit/rehearse/test_recipes.py)."""
    config = RunConfig.from_toml(RECIPES / f"{recipe}.toml", [])
    names = [role.name for role in roles_of(config.layout(ranks))]
    alike = dict.fromkeys(names, 1) if every else kinds_of_stages(config, ranks)
    chosen = [part for name in alike for part in ("--role", name)]
    found = rehearse(tmp_path, f"{recipe}.toml", ranks, "npu", "--ops", "ascend", *chosen)
    roles, architecture = found["roles"], config.model.architecture()
    assert [role["role"] for role in roles] == list(alike)

    def of_job(count: Callable[[dict[str, Any]], int]) -> int:
        return sum(alike[role["role"]] * role["num_ranks"] * count(role) for role in roles)

    def sent(kind: str) -> int:
        return of_job(lambda role: sum(e["num_bytes"] for e in role["exchanges"] if e["kind"] == kind))

    assert of_job(lambda _: 1) == ranks
    for role in roles:
        assert 2**34 < role["peak_bytes"] <= found["usable_bytes"][role["role"]], role["role"]
        for operator in ("npu.npu_sparse_flash_attention", "npu.npu_sparse_flash_attention_grad", "aten.matmul"):
            assert role["flops_by_operation"][operator] > 0, role["role"]
    # each token's experts: three matrices of 2 d f FLOPs, forward, again in backward, and for the input's gradient
    choices = config.train.rows_per_step * config.data.row_tokens * architecture.num_experts_per_tok
    layers = architecture.num_hidden_layers + architecture.num_nextn_predict_layers
    once = layers * choices * 6 * architecture.hidden_size * architecture.moe_intermediate_size
    assert of_job(lambda role: role["flops_by_operation"]["npu.npu_grouped_matmul"]) == 3 * once
    assert of_job(lambda role: role["flops_by_operation"]["npu.npu_grouped_matmul_add_"]) == once
    assert sent("send") == sent("recv")


@pytest.mark.slow
def test_a_device_changes_no_exchange(tmp_path: Path) -> None:
    """The last stage, which has every kind of attention, the MTP block, the head and the loss."""
    recipe, ranks = "v4_pro_sft_910c_512.toml", 512
    role = roles_of(RunConfig.from_toml(RECIPES / recipe, []).layout(ranks))[-1].name
    npu, cpu = (
        rehearse(tmp_path, recipe, ranks, device, "--role", role, "--ops", operations)["roles"][0]
        for device, operations in (("npu", "ascend"), ("cpu", "cpu"))
    )
    assert npu["num_parameters"] == cpu["num_parameters"]
    assert npu["peak_by_category"]["parameters"] == cpu["peak_by_category"]["parameters"]
    assert collectives(npu) == collectives(cpu)


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
