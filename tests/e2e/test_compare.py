"""`fullweight compare` on runs that were really trained: twins, and runs that part at a known place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.processes import fullweight

from fullweight.evidence.parting import parting

_SHORT = ["train.num_steps=4", "checkpoint.every=2", "checkpoint.keep=9"]
_SHORT += ["eval.num_samples=0", "data.held_out_fraction=0.02", "export.enabled=false"]


def _train(folder: Path, *more: str) -> Path:
    overrides = [part for text in (*_SHORT, *more) for part in ("--set", text)]
    done = fullweight("train", "recipes/tiny_smoke.toml", "--output", folder, *overrides)
    assert done.ok, done.output
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("runs") / "first")


def test_twins_are_identical_in_losses_and_weights(first: Path, tmp_path: Path) -> None:
    done = fullweight("compare", first, _train(tmp_path / "twin"))
    assert done.ok, done.output
    assert "identical: lm" in done.output
    assert "weights equal bit for bit at step 2, 4" in done.output


def test_another_rate_is_seen_at_the_step_after_it_was_used(first: Path, tmp_path: Path) -> None:
    other = _train(tmp_path / "other", "optimizer.learning_rate=0.03")
    done = fullweight("compare", first, other, "--json", tmp_path / "found.json")
    assert done.statuses == (1,), done.output
    pair = json.loads((tmp_path / "found.json").read_text())["pairs"][0]
    by_name = {d["metric"]: d for d in pair["differences"]}
    assert by_name["learning_rate"]["first_unequal"] == 1
    assert by_name["lm"]["first_unequal"] == 2  # the first loss is of weights that no step has touched
    assert pair["weights"]["step"] == 2
    assert pair["weights"]["tensors"][0]["name"] == "model.embed.weight"


def test_tensors_come_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    frozen = "train.frozen=['embed.weight', 'layers.0.*']"
    one = _train(tmp_path / "one", frozen, "train.num_steps=2")
    other = _train(tmp_path / "other", frozen, "train.num_steps=2", "optimizer.learning_rate=0.03")
    found = parting(one / "checkpoints", other / "checkpoints")
    assert found.step == 2
    names = [d.name for d in found.tensors]
    assert names[0].startswith("model.layers.1.")
    blocks = [place for place, name in enumerate(names) if name.startswith("model.layers.")]
    assert blocks[-1] < names.index("model.norm.weight") < names.index("model.head.weight")
    assert names[-1].startswith("model.mtp.")


def test_runs_without_a_common_checkpoint(first: Path, tmp_path: Path) -> None:
    other = _train(tmp_path / "other", "checkpoint.every=3", "train.num_steps=3")
    assert "no checkpoint of the same step" in str(parting(first / "checkpoints", other / "checkpoints"))
