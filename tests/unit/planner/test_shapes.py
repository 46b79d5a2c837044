"""Parameters and FLOPs of published models, against what their publishers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import training_flops_per_token
from fullweight.planner.families import families, shape_of_file
from fullweight.planner.shapes import work_of, work_of_v4

# billions of parameters: model cards (DeepSeek-V3's 671 are without its MTP layer)
SIZES = {"llama3-8b": 8.03, "llama3-70b": 70.6, "llama3-405b": 405.9, "mixtral-8x7b": 46.7, "deepseek-v3": 671.0}
SIZES |= {"kimi-k2": 1026.0, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1, "gpt-oss-120b": 116.8}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    work = work_of(families()[name].model_copy(update={"mtp_layers": 0}), 4096)
    assert (work.dense_parameters + work.expert_parameters) / 1e9 == pytest.approx(SIZES[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "sequence", "gflops"),
    [
        ("deepseek-v3", 4096, 1276 / 4.912),  # Megatron-Bridge: TFLOP/s over tokens/s, which is its own count
        ("kimi-k2", 4096, 1099 / 5.372),
        ("qwen3-30b-a3b", 4096, 1029 / 44.544),
        ("qwen3-235b-a22b", 4096, 1077 / 7.280),
        ("llama3-70b", 8192, 2348 / 5.248),
        ("llama3-405b", 8192, 2646 / 1.048),
        ("gpt-oss-120b", 4096, 1077 / 33.024),
    ],
)
def test_flops_are_those_of_another_count(name: str, sequence: int, gflops: float) -> None:
    assert work_of(families()[name], sequence).training_flops / 1e9 == pytest.approx(gflops, rel=0.01)


def test_a_shape_comes_from_a_config_json(tmp_path: Path) -> None:
    """The defaults of transformers' own classes are published models; ours are theirs."""
    from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig

    for made, name in (
        (MixtralConfig(), "mixtral-8x7b"),
        (DeepseekV3Config(), "deepseek-v3"),
        (GptOssConfig(), "gpt-oss-120b"),
    ):
        made.save_pretrained(tmp_path)
        (tmp_path / "config.json").rename(tmp_path / f"{name}.json")
        assert shape_of_file(tmp_path / f"{name}.json") == families()[name]


def test_a_shape_may_be_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("layers = 2\nhidden = 64\nheads = 4\nkv_heads = 2\nhead_dim = 16\nffn = 256\nvocab = 1000\n")
    assert work_of(shape_of_file(file), 128).dense_parameters == 2 * (64 * 16 * 12 + 3 * 64 * 256) + 2 * 64 * 1000
    (tmp_path / "other.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="describes model_type 'mamba', whose layers have no shape"):
        shape_of_file(tmp_path / "other.json")
    (tmp_path / "part.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="has no 'num_attention_heads'"):
        shape_of_file(tmp_path / "part.json")


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_v4_is_its_exact_count(preset: str) -> None:
    """Three times forward; the ledger's training count takes off what the indexer's detached input saves."""
    config = DeepSeekV4Config.preset(preset)
    work = work_of_v4(config, [4096])
    assert work.dense_parameters + work.expert_parameters == config.num_parameters(mtp=True)
    assert work.training_flops == pytest.approx(training_flops_per_token(config, [4096]), rel=0.02)
    assert sum(work.stage_costs) == pytest.approx(work.training_flops / 3, rel=1e-9)
