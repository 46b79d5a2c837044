"""The committed recipes keep the promise of the first line of their description: every parameter trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fullweight.core.config import apply_overrides, read_toml
from fullweight.parallel.mesh import Ranks
from fullweight.train.assemble import assemble
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder
from fullweight.train.step import Phases, StepResult, training_step

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
# A vocabulary of 129,280 makes a full row slow; a shorter one, of truncated documents, reaches as much.
SHORT = ["data.row_tokens=512"]


def first_step(name: str, overrides: list[str]) -> tuple[RunConfig, StepResult]:
    """The recipe's first step, as the loop takes it."""
    values: dict[str, Any] = apply_overrides(read_toml(ROOT / "recipes" / f"{name}.toml"), overrides)
    values["train"]["peak_flops_per_second"] = 1e9  # not measured
    values["eval"]["num_samples"] = 0
    config = RunConfig.resolve(values, name)
    run = assemble(config, RunFolder(ROOT / "runs" / "never-made"), Ranks(0, 1, CPU))
    result = training_step(
        run.model,
        config.method,
        run.state.optimizers,
        [next(run.state.loader) for _ in range(run.rows_per_rank)],
        engine=run.engine,
        losses=config.train.loss,
        clip_norm=config.optimizer.clip_norm,
        guard=run.guard,
        ranks=run.ranks,
        phases=Phases(CPU),
    )
    run.state.loader.close()
    return config, result


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny_smoke", []),
        pytest.param("quickstart", [], marks=pytest.mark.slow),
        pytest.param("small_sft_or", SHORT, marks=pytest.mark.shared_data),
        pytest.param("small_cpt_or", SHORT, marks=pytest.mark.shared_data),
    ],
)
def test_the_first_step_reaches_every_parameter(
    name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is without a gradient, so none is left where it started by the choice of data."""
    monkeypatch.chdir(ROOT)
    config, result = first_step(name, overrides)
    assert result.refusal is None
    assert result.without_gradient == ()
    assert config.train.trained_names(config.model.architecture()) is None, "the recipe freezes nothing"


def test_every_recipe_is_covered() -> None:
    """A new recipe that trains all parameters has to be in the list above."""
    whole = {"tiny_smoke", "quickstart", "small_sft_or", "small_cpt_or"}
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        if path.stem.startswith("v4_"):  # too large to step here; tests/unit/rehearse/test_recipes.py has them
            continue
        config = RunConfig.from_toml(path)
        assert (path.stem in whole) == (config.train.trained_names(config.model.architecture()) is None), path.stem
