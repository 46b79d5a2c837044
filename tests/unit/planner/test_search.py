"""A plan keeps what must hold: what fits is legal, more memory never unfits, and reasons are in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processes import fullweight

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import ParallelConfig
from fullweight.planner.chips import chip
from fullweight.planner.explain import neighbours, reliability, sensitivity, unknowns
from fullweight.planner.recipe import recipe_text
from fullweight.planner.search import Planner, Request, easy_batches, mfu
from fullweight.train.config import RunConfig

FLASH = DeepSeekV4Config.preset("flash")


def request(ranks: int = 128, **changes: object) -> Request:
    base = Request("flash", FLASH, chip("ascend-910c"), ranks, 4096, 256)
    return replace(base, **changes)  # type: ignore[arg-type]


PLANNER = Planner(request())
PLAN = PLANNER.search(3)


def test_what_is_proposed_is_legal_fits_and_is_in_order() -> None:
    assert len(PLAN.best) == 3
    seconds = [candidate.seconds for candidate in PLAN.best]
    assert seconds == sorted(seconds)
    for candidate in PLAN.best:
        assert candidate.layout == candidate.parallel.layout(128, FLASH, 4096, 256)
        assert max(stage.peak for stage in candidate.memory) <= candidate.usable
        assert 0 < mfu(PLANNER.request, candidate.seconds) < 1


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([40.0, 59.6, 80.0, 140.0]), st.sampled_from([1.1, 1.5, 2.0]))
def test_more_memory_never_unfits(memory: float, factor: float) -> None:
    """A layout that fits a chip fits one with more memory, so the best step is no slower."""
    small = chip("ascend-910c").model_copy(update={"memory_gb": memory})
    large = chip("ascend-910c").model_copy(update={"memory_gb": memory * factor})
    parallel = ParallelConfig(tensor=2, expert=64, recompute="full", offload_optimizer=True)
    fits = [Planner(request(chip=c)).evaluated(parallel).fits for c in (small, large)]
    assert fits[1] or not fits[0]


def test_the_best_with_more_memory_is_no_slower() -> None:
    large = chip("ascend-910c").model_copy(update={"memory_gb": 119.2})
    assert Planner(request(chip=large)).search(1).best[0].seconds <= PLAN.best[0].seconds


def test_neighbours_say_why_not() -> None:
    found = {n.change: n.reason for n in neighbours(PLANNER, PLAN.best[0])}
    assert any("GiB; the most are" in reason for reason in found.values())
    assert any("slower" in reason for reason in found.values())
    assert len(found) >= 6


def test_effects_have_the_sign_that_they_must() -> None:
    effects = {e.what: e.change for e in sensitivity(PLAN.best[0])}
    assert effects["expert load 1.5 times the mean"] > 0
    assert all(change <= 1e-12 for what, change in effects.items() if "expert load" not in what)


def test_reliability_by_hand() -> None:
    """128 ranks at 1e-4 an hour: 78.125 h between; checkpoints of 60 s every sqrt(2 x 60 x 281250) s."""
    found = reliability(PLAN.best[0], 1e-4, 60.0, 600.0)
    assert found.hours_between == pytest.approx(78.125)
    assert found.checkpoint_every_seconds == pytest.approx(5809.475, rel=1e-6)
    assert found.effective_share == pytest.approx(1 - 60 / 5809.475 - (5809.475 / 2 + 600) / 281250, rel=1e-6)
    assert not found.replica_recovery


def test_what_is_unknown_is_told() -> None:
    assert any("expert load" in line for line in unknowns(PLAN.best[0]))
    assert any("assumption" in line for line in unknowns(PLAN.best[0]))


def test_the_recipe_is_one_that_training_reads(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_text(PLANNER.request, PLAN.best[0]))
    config = RunConfig.from_toml(file, [])
    assert config.layout(128) == PLAN.best[0].layout
    assert config.parallel == PLAN.best[0].parallel
    assert config.train.rows_per_step == 256


def test_a_batch_that_nothing_divides_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--global-batch 1021 is not divisible .* use 1020 or 1022|use "):
        Planner(request(ranks=65536, global_batch=1021)).search()


def test_counts_that_no_axis_divides_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 14 ranks .* use 4 chips or 8 chips"):
        Planner(request(ranks=14)).search()
    assert easy_batches(request(global_batch=1021)) == (1008, 1024)
    assert easy_batches(request(global_batch=1024)) == ()


def test_the_command_plans_emits_and_records(tmp_path: Path) -> None:
    recipe, record = tmp_path / "recipe.toml", tmp_path / "plan.json"
    result = fullweight(
        *("plan", "deepseek-v4-flash", "--chip", "ascend-910c", "--chips", "64", "--global-batch", "256"),
        *("--steps", "100", "--price", "2", "--emit", recipe, "--json", record),
    )
    assert result.ok
    assert "128 dies of ascend-910c" in result.output
    assert "why not" in result.output
    assert recipe.is_file()
    (plan,) = json.loads(record.read_text())
    assert plan["layouts"][0]["cost"] > 0
    assert plan["reliability"]["replica_recovery"] is False


def test_mistakes_are_one_message() -> None:
    base = ("plan", "flash", "--chips", "64")
    result = fullweight(*base, "--chip", "ascend-910")
    assert not result.ok
    assert "unknown chip 'ascend-910'; did you mean" in result.output
    result = fullweight(*base, "--chip", "h100", "--compare", "h200")
    assert "expected a chip and a number of chips" in result.output


def test_clusters_side_by_side(tmp_path: Path) -> None:
    result = fullweight(
        *("plan", "flash", "--chip", "ascend-910c", "--chips", "64", "--global-batch", "256"),
        *("--compare", "nvidia-h100:128", "--html", tmp_path / "plan.html"),
    )
    assert result.ok
    page = (tmp_path / "plan.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # two of each job, and both side by side
    assert "Why not" in page
    assert "kWh a step" in result.output
    assert "h100 x128" in result.output
