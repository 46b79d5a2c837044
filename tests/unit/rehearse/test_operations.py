"""A rehearsal says whose operations it counted, and how the chip's own are; those of CUDA need no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.planner.chips import chip
from fullweight.rehearse.report import operations_note
from fullweight.rehearse.result import Rehearsal
from fullweight.rehearse.routing import Routing
from fullweight.rehearse.run import _of_the_chip, _operations, rehearse
from fullweight.train.config import RunConfig

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny_smoke.toml"


@pytest.mark.parametrize(
    ("device", "chip_name", "settings", "own"),
    [
        ("cpu", "ascend-910c", [], False),
        ("cpu", "h200", [], False),
        ("cpu", "h200", ["ops.default=cuda"], True),
        ("cpu", "ascend-910c", ["ops.default=cuda"], False),
        ("npu", "ascend-910c", [], True),
        ("ascend", "ascend-910b1", ["ops.default=ascend"], True),
        ("ascend", "ascend-910c", ["ops.default=reference"], False),
        ("npu", "h200", [], False),
        ("cuda", "h200", [], True),
        ("cuda", "ascend-910c", [], False),
    ],
)
def test_whose_operations_were_counted(device: str, chip_name: str, settings: list[str], own: bool) -> None:
    config = RunConfig.from_toml(RECIPE, settings)
    assert _of_the_chip(config, device, chip(chip_name)) is own


def test_what_was_not_counted_says_how_it_is() -> None:
    config = RunConfig.from_toml(RECIPE, [])
    words = _operations(config, "cpu")
    done = Rehearsal("r.toml", {}, 1, "ascend-910c", {}, 0, "uniform", 1, 1, 64, words, of_the_chip=False)
    told = operations_note(done)
    assert told.startswith("operations counted: those of the CPU")
    assert "--device ascend --ops ascend counts them" in told
    assert "--ops cuda counts them" in operations_note(replace(done, chip="h200"))
    assert "which are those of ascend-910c" in operations_note(replace(done, of_the_chip=True))


SETTINGS = ["model.preset=small", "train.device=cpu", "data.row_tokens=1024", "parallel.recompute=none"]
UNIFORM = Routing.parse("uniform")


def test_cuda_operations_are_traced_without_a_gpu() -> None:
    """The reference's hyper-connections keep the streams in fp32 twice a sublayer; theirs keep no wide copy."""
    kept = {}
    for others in ([], ["ops.hyper_connection=reference"]):
        config = RunConfig.from_toml(RECIPE, [*SETTINGS, "ops.default=cuda", *others])
        [role] = rehearse(config, "r.toml", 1, chip("h200"), UNIFORM).roles
        kept[bool(others)] = role.most_by_category["activations"]
    model = DeepSeekV4Config.preset("small")
    streams = 1024 * model.hc_mult * model.hidden_size
    assert kept[False] <= kept[True] - 2 * model.num_hidden_layers * 2 * 4 * streams


def test_operations_whose_results_depend_on_values_are_refused() -> None:
    config = RunConfig.from_toml(RECIPE, [*SETTINGS, "ops.default=reference"])
    with pytest.raises(ConfigError, match=r"operations 'reference': aten.nonzero.*trace others"):
        rehearse(config, "r.toml", 1, chip("h200"), UNIFORM)
