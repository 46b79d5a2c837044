"""Rows that a rank's experts are taken to receive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.processes import ROOT

from fullweight.core.config import apply_overrides, read_toml
from fullweight.core.errors import ConfigError
from fullweight.rehearse.role import most_rows
from fullweight.rehearse.routing import Routing
from fullweight.train.config import RunConfig


def test_uniform_and_worst() -> None:
    """4 ranks send 600 choices each, 6 a token: on average a rank gets 600, at worst every token of all four."""
    assert Routing.parse("uniform").received(600, 4, 6, 8) == 600
    assert Routing.parse("worst").received(600, 4, 6, 8) == 4 * 100 * 6
    # three local experts can be chosen three times by a token, not six
    assert Routing.parse("worst").received(600, 4, 6, 3) == 4 * 100 * 3


def test_measured_takes_the_largest_load_of_a_ledger(tmp_path: Path) -> None:
    lines = [{"kind": "event", "step": 0}] + [
        {"kind": "step", "step": 1, "experts": {"max_over_mean": m}} for m in (1.5, 2.5, 2.0)
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    routing = Routing.parse(str(tmp_path))
    assert routing.received(600, 4, 6, 8) == 1500
    assert routing.received(600, 2, 6, 8) == 2 * 100 * 6, "no more than there are choices"
    assert str(routing) == "measured, 2.50 times the mean"


@pytest.mark.parametrize(
    ("ranks", "rank", "axes", "rows"),
    [
        (4, 3, {"expert": 2}, 2),  # two ranks, each with a row of its own
        (8, 5, {"context": 2, "expert": 4}, 2),  # four ranks, two of each row
        (8, 5, {"context": 2, "tensor": 2, "expert": 2}, 1),  # two ranks of one row
        (8, 7, {"pipeline": 2, "replicate": 2, "expert": 1}, 1),
    ],
)
def test_a_capacity_bounds_what_arrives(ranks: int, rank: int, axes: dict[str, int], rows: int) -> None:
    """Each of a rank's experts takes 96 choices of a row: 1.5 x 256 tokens x 2 choices / 8 experts."""
    settings = ["train.rows_per_step=8", "data.row_tokens=512" if axes.get("tensor") else "data.row_tokens=256"]
    settings += ["model.changes={compress_ratios=[0,0,4,4,0]}", *(f"parallel.{k}={v}" for k, v in axes.items())]
    values = apply_overrides(read_toml(ROOT / "recipes/tiny_smoke.toml"), settings)
    config = RunConfig.resolve(values, "test")
    assert most_rows(config, config.layout(ranks), rank) is None
    config = RunConfig.resolve(apply_overrides(values, ["parallel.expert_capacity_factor=1.5"]), "test")
    capacity = 96 * config.data.row_tokens // 256
    assert most_rows(config, config.layout(ranks), rank) == rows * capacity * (8 // config.parallel.expert)


@pytest.mark.parametrize(("content", "said"), [("", "no step yet"), ("{\n", "ledger.jsonl:1: damaged line")])
def test_a_ledger_without_loads_is_told(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=said):
        Routing.parse(str(tmp_path))
    with pytest.raises(ConfigError, match="expected uniform, worst, or a run folder"):
        Routing.parse(str(tmp_path / "nowhere"))
