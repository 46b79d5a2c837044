"""Model sizes: published configs load and come back, presets hold, impossible sizes are explained."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import (
    PRESETS,
    DeepSeekV4Config,
    LayerKind,
    RopeScaling,
    yarn_correction_range,
)

# The released Flash config.json, key for key, with the keys that only a later release has.
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}
LATER = {
    **FLASH,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [40, 41, 42],
}


@pytest.mark.parametrize("published", [FLASH, LATER])
def test_published_config_round_trip(published: dict[str, Any], tmp_path: Path) -> None:
    """A released config.json, read from its folder and written back, is the same file, unknown keys too."""
    (tmp_path / "config.json").write_text(json.dumps(published), encoding="utf-8")
    config = DeepSeekV4Config.from_file(tmp_path)
    assert DeepSeekV4Config.from_file(tmp_path / "config.json") == config
    assert json.loads(json.dumps(config.to_published())) == published
    assert config.to_published(torch_dtype="float32")["torch_dtype"] == "float32"


def test_the_flash_preset_is_the_released_config() -> None:
    """Preset and published file give one and the same object."""
    assert DeepSeekV4Config.from_published(FLASH) == DeepSeekV4Config.preset("flash")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_export(name: str) -> None:
    """Every preset goes through the published form and through its own JSON unchanged."""
    config = DeepSeekV4Config.preset(name)
    assert DeepSeekV4Config.from_published(json.loads(json.dumps(config.to_published()))) == config
    assert DeepSeekV4Config.resolve(json.loads(config.to_json())) == config


def test_transformers_reads_what_is_published() -> None:
    """The independent reader sees the same layer kinds, hash layers and rotary settings."""
    from transformers import DeepseekV4Config

    for name in PRESETS:
        config = DeepSeekV4Config.preset(name)
        other = DeepseekV4Config(**config.to_published())
        layers = range(config.num_hidden_layers)
        assert list(other.layer_types) == [config.layer_kind(i).value for i in layers]
        assert [t == "hash_moe" for t in other.mlp_layer_types] == [config.is_hash_layer(i) for i in layers]
        assert other.rope_parameters["main"]["rope_theta"] == config.rope_theta
        assert other.rope_parameters["compress"]["rope_theta"] == config.compress_rope_theta
        assert other.rope_parameters["compress"]["factor"] == config.rope_scaling.factor
        assert other.head_dim * other.partial_rotary_factor == config.qk_rope_head_dim


def test_published_parameter_counts() -> None:
    """Flash and Pro, with and without MTP, to the last parameter."""
    counts = {
        "flash": (284_332_230_231, 290_942_278_866),
        "pro": (1_572_997_179_491, 1_598_837_325_086),
    }
    for name, (without, with_mtp) in counts.items():
        config = DeepSeekV4Config.preset(name)
        assert config.num_parameters(mtp=False) == without
        assert config.num_parameters(mtp=True) == with_mtp


def test_parameter_count_against_transformers() -> None:
    """The closed form equals the parameters of the instantiated transformers model (it has no MTP)."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    for name in ("tiny", "small", "bench"):
        config = DeepSeekV4Config.preset(name)
        with torch.device("meta"):
            model = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_published()))
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters(mtp=False)


@pytest.mark.parametrize(("name", "census"), [("flash", (2, 21, 20)), ("pro", (0, 30, 31))])
def test_layer_census(name: str, census: tuple[int, int, int]) -> None:
    """Published counts of sliding, CSA and HCA layers; the MTP layer is sliding; three hash layers."""
    config = DeepSeekV4Config.preset(name)
    kinds = (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA)
    assert tuple(config.count_layers(kind) for kind in kinds) == census
    assert config.layer_kind(config.num_hidden_layers) is LayerKind.SLIDING
    assert config.ratios == (4, 128)
    assert [i for i in range(config.num_hidden_layers) if config.is_hash_layer(i)] == [0, 1, 2]


def test_small_presets_have_every_block_kind() -> None:
    """tiny, small and bench each hold sliding, CSA, HCA, hash, scored and MTP layers."""
    for name in ("tiny", "small", "bench"):
        config = DeepSeekV4Config.preset(name)
        assert all(config.count_layers(kind) for kind in LayerKind)
        assert 0 < config.num_hash_layers < config.num_hidden_layers
        assert config.num_nextn_predict_layers == 1
    bench = DeepSeekV4Config.preset("bench")
    assert bench.count_layers(LayerKind.CSA) >= 2
    assert bench.count_layers(LayerKind.HCA) >= 2


def test_yarn_range_of_the_released_models() -> None:
    """Verified against transformers: the ramp runs from rotary pair 15 to 25."""
    assert yarn_correction_range(DeepSeekV4Config.preset("pro")) == (15, 25)


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(16, 10**6),
    fast=st.floats(2, 64),
    theta=st.floats(1000, 1e6),
    half=st.integers(1, 64),
)
def test_yarn_range_against_transformers(length: int, fast: float, theta: float, half: int) -> None:
    """Same frequencies as transformers' YaRN for any setting: the range decides them all."""
    import torch
    from transformers import DeepseekV4Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = 2 * half
    config = DeepSeekV4Config.preset(
        "tiny",
        head_dim=max(32, dim),
        index_head_dim=max(16, dim),
        qk_rope_head_dim=dim,
        compress_rope_theta=theta,
        rope_scaling=RopeScaling(original_max_position_embeddings=length, beta_fast=fast).model_dump(),
    )
    other = DeepseekV4Config(**config.to_published())
    other.rope_parameters = {
        **other.rope_parameters["compress"],
        "partial_rotary_factor": dim / config.head_dim,
    }
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](other, "cpu")
    low, high = yarn_correction_range(config)
    pairs = torch.arange(half, dtype=torch.float64)
    span = high - low if high != low else 0.001
    ramp = ((pairs - low) / span).clamp(0, 1)
    plain = theta ** (-2 * pairs / dim)
    ours = plain * (1 - ramp) + plain / config.rope_scaling.factor * ramp
    torch.testing.assert_close(ours, expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"o_groups": 3}, r"num_attention_heads \(4\) is not divisible by o_groups \(3\); use 1, 2, 4"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) exceeds n_routed_experts \(8\)"),
        ({"compress_ratios": [0, 2, 128, 4, 0]}, r"ratios \[2\] are not among 0 \(sliding\), 4 \(CSA\) and"),
        ({"compress_ratios": [0, 4, 128, 4]}, "has 4 entries, expected 5: 4 layers and 1 MTP layer"),
        ({"compress_ratios": [0, 4, 128, 4, 4]}, "the MTP layer .* must have ratio 0"),
        ({"head_dim": 8}, r"head_dim \(8\) is below qk_rope_head_dim \(16\)"),
        ({"index_head_dim": 8}, r"index_head_dim \(8\) is below qk_rope_head_dim \(16\)"),
        ({"qk_rope_head_dim": 15}, r"qk_rope_head_dim \(15\) must be even"),
        ({"eos_token_id": 512}, r"eos_token_id \(512\) is outside the vocabulary of 512"),
        ({"hidden_size": 0}, r"hidden_size: Input should be greater than 0 \(found 0\)"),
        ({"hidden_size": "wide"}, r"hidden_size: .*\(found 'wide'\)"),
        ({"swiglu_limit": float("inf")}, "swiglu_limit: .*finite"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads: Input should be 1 \(found 4\)"),
        ({"scoring_func": "softmax"}, r"scoring_func: .*'sqrtsoftplus' \(found 'softmax'\)"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.type: .*'yarn' \(found 'linear'\)"),
        ({"rope_scaling": {"facto": 2}}, "unknown key rope_scaling.facto; did you mean 'factor'"),
        ({"rope_scaling": {"beta_fast": 0}}, "rope_scaling.beta_fast: .*greater than 0"),
        ({"rope_scaling": {"beta_fast": 1, "beta_slow": 2}}, r"beta_fast \(1.0\) is below beta_slow \(2.0\)"),
        ({"sliding_window": 2**21}, r"sliding_window \(2097152\) exceeds max_position_embeddings \(1048576\)"),
        ({"vocab_size": 10**23}, r"these sizes make 1.3e\+25 parameters, expected at most 1e\+15"),
        ({"hiden_size": 64}, "unknown key hiden_size; did you mean 'hidden_size'"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    """Each says what was found and what is possible, and starts with where it came from."""
    with pytest.raises(ConfigError, match=message) as caught:
        DeepSeekV4Config.preset("tiny", **changes)
    assert str(caught.value).startswith("model preset tiny: ")


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown model preset 'flush'; did you mean 'flash'"):
        DeepSeekV4Config.preset("flush")


def test_bad_files(tmp_path: Path) -> None:
    """Absent, unreadable, not JSON, not an object, another model, a key missing: one message, with path."""
    path = tmp_path / "config.json"
    cases: list[tuple[Any, str]] = [
        (None, "no config.json at .*config.json"),
        (b"\xff\xfe", "config.json is not UTF-8"),
        (b"{", "config.json is not JSON: .*column 2"),
        (b"[" * 200_000, "config.json is JSON nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "config.json is not JSON .* too many digits"),
        (b"[]", "describes model_type 'list'; expected 'deepseek_v4'"),
        (b"{}", "describes model_type None"),
        (b'{"model_type": "deepseek_v3"}', "describes model_type 'deepseek_v3'"),
        (b'{"model_type": "deepseek_v4"}', "config.json: vocab_size is required"),
    ]
    for content, message in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            DeepSeekV4Config.from_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        DeepSeekV4Config.from_file(path / "config.json")
