"""A rehearsal says whose operations it counted, and how the chip's own are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fullweight.planner.chips import chip
from fullweight.rehearse.report import operations_note
from fullweight.rehearse.result import Rehearsal
from fullweight.rehearse.run import _of_the_chip, _operations
from fullweight.train.config import RunConfig

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny_smoke.toml"


@pytest.mark.parametrize(
    ("device", "chip_name", "settings", "own"),
    [
        ("cpu", "ascend-910c", [], False),
        ("cpu", "h200", [], False),
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
    assert "nothing was traced with them" in operations_note(replace(done, chip="h200"))
    assert "which are those of ascend-910c" in operations_note(replace(done, of_the_chip=True))
