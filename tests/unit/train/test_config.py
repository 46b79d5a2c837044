"""Recipes resolve, and what cannot work is refused before any work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.config import apply_overrides, read_toml
from fullweight.core.errors import ConfigError
from fullweight.train.config import RunConfig

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))
SMOKE = read_toml(Path(__file__).parents[3] / "recipes" / "tiny_smoke.toml")


def resolve(*overrides: str) -> RunConfig:
    return RunConfig.resolve(apply_overrides(SMOKE, list(overrides)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_resolves_and_comes_back_from_json(path: Path) -> None:
    """The resolved config beside a run must give the same run again."""
    config = RunConfig.from_toml(path)
    assert RunConfig.resolve(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.nmu_steps=3", "did you mean 'num_steps'"),
        ("model.preset=tiyn", "unknown model preset 'tiyn'"),
        ("model.changes.hidden_szie=3", "hidden_szie"),
        ("model.changes.n_routed_experts=1", "num_experts_per_tok"),
        ("model.checkpoint=x", "exactly one of preset, config and checkpoint"),
        ("method.name=dpo", "sft"),
        ("data.tokenizer=folder", "exclude each other"),
        ("tokenizer.vocab_size=600", "model.changes.vocab_size=600"),
        ("schedule.warmup_steps=13", "never reached"),
        ("train.num_steps=0", "num_steps"),
        ("train.precision=fp16", "precision"),
        ("optimizer.learning_rate=-1.0", "learning_rate"),
        ("model.changes.max_position_embeddings=100", "max_position_embeddings"),
        ("name=../x", "name"),
        ('train.trainable=["*.indexr.*"]', "matches no parameter; nearest: layers.*.attn.indexer"),
        ("train.trainable=[]", "train.trainable"),
        ('train.frozen=["*"]', "leaves no parameter to train"),
        ("train.csa_attention=visible", 'set indexer_loss="visible"'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(override: str, said: str) -> None:
    """Each mistake gives one message that names it."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve(override)


def test_indexers_alone_need_their_loss() -> None:
    """Nothing would train, and the step would have no gradient to take."""
    alone = 'train.trainable=["*.indexer.*"]'
    with pytest.raises(ConfigError, match=r"only indexers to train.*indexer_loss"):
        resolve(alone, "train.indexer_loss=none")
    assert resolve(alone, "train.indexer_loss=visible").train.trained_names(resolve().model.architecture())
    assert resolve().train.trained_names(resolve().model.architecture()) is None


def test_rows_must_divide_over_ranks() -> None:
    """The message gives the nearest counts that work."""
    config = resolve("train.rows_per_step=8")
    assert config.layout(4).data_size == 4
    with pytest.raises(ConfigError, match="use 6 or 9"):
        config.layout(3)
    with pytest.raises(ConfigError, match="use 16"):
        config.layout(16)


def test_required_sections_have_no_default() -> None:
    """What must be chosen is asked for by name."""
    values: dict[str, Any] = {k: v for k, v in SMOKE.items() if k != "optimizer"}
    with pytest.raises(ConfigError, match="optimizer is required"):
        RunConfig.resolve(values)
