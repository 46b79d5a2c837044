"""The tensor list against the published counts and bytes, the release's shards, and the model itself."""

from __future__ import annotations

import math

import pytest

from fullweight.checkpoint.published import (
    LAYOUTS,
    Kind,
    Totals,
    draft_tensors,
    num_shards,
    published_tensors,
    shard_file,
    totals,
)
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import to_published
from fullweight.models.deepseek_v4.model import DeepSeekV4

from .formats import tiny, with_drafts


def released(name: str) -> DeepSeekV4Config:
    """Flash, Pro and their DSpark successors, as their config.json files say them."""
    base, _, dspark = name.partition("-")
    config = DeepSeekV4Config.preset(base)
    return with_drafts(config, rank={"flash": 256, "pro": 512}[base]) if dspark else config


@pytest.mark.parametrize(
    ("name", "tensors", "payload", "shards"),
    [
        ("flash", 69_187, 159_609_485_896, 46),
        ("pro", 145_116, 864_704_792_696, 64),
        ("flash-0731", 72_317, 166_878_536_440, 48),
        ("pro-0813", 149_782, 892_727_580_904, 66),
    ],
)
def test_totals_are_the_published_ones(name: str, tensors: int, payload: int, shards: int) -> None:
    """Index total_size, number of tensors and of files of the four releases."""
    config = released(name)
    assert totals(config) == Totals(tensors, payload)
    assert num_shards(config) == shards
    used = {t.shard for t in (*published_tensors(config), *draft_tensors(config))}
    assert used == set(range(1, shards + 1))


@pytest.mark.parametrize(("name", "payload"), [("flash", 292_555_345_480), ("pro", 1_602_325_824_632)])
def test_base_layout_differs_in_experts_and_scales_alone(name: str, payload: int) -> None:
    """FP8 experts, fp32 scales: the bytes that follow for the Base releases."""
    assert totals(released(name), LAYOUTS["base"]).payload_bytes == payload


def test_elements_are_the_models_parameters_and_buffers() -> None:
    """Flash's: parameters with MTP, the main layers' router biases and hash tables, the MTP's biases."""
    elements = sum(math.prod(t.shape) for t in published_tensors(DeepSeekV4Config.preset("flash")))
    assert elements == 290_942_278_866 + 2_337_280 + 256


@pytest.mark.parametrize("config", [tiny(), tiny(num_nextn_predict_layers=0), DeepSeekV4Config.preset("small")])
def test_names_and_shapes_are_the_models(config: DeepSeekV4Config) -> None:
    """What the model exports is what the list says, tensor for tensor."""
    state = to_published(DeepSeekV4(config, ops="reference").state_dict(), config)
    listed = {t.name: t for t in published_tensors(config)}
    assert state.keys() == listed.keys()
    for name, tensor in state.items():
        assert tuple(tensor.shape) == listed[name].shape, name
        assert (listed[name].kind is Kind.TABLE) == (not tensor.is_floating_point()), name


def test_the_release_quantises_what_the_table_says() -> None:
    """Experts FP4; attention projections, indexer queries, shared experts and MTP projections FP8; no others."""
    kinds = {t.name: t.kind for t in published_tensors(DeepSeekV4Config.preset("flash"))}
    assert kinds["layers.7.ffn.experts.11.w2.weight"] is Kind.EXPERT
    assert kinds["mtp.0.ffn.experts.0.w1.weight"] is Kind.EXPERT
    matrices = {n.split(".", 2)[2] for n, k in kinds.items() if k is Kind.MATRIX}
    expected = {f"attn.{n}.weight" for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")}
    expected |= {f"ffn.shared_experts.{n}.weight" for n in ("w1", "w2", "w3")}
    assert matrices == expected | {"e_proj.weight", "h_proj.weight"}
    wide = {n.split(".")[-1] for n, k in kinds.items() if k is Kind.WIDE}
    expected = {f"hc_{s}_{p}" for s in ("attn", "ffn", "head") for p in ("fn", "base", "scale")}
    assert wide == expected | {"attn_sink", "ape", "bias"}


def test_draft_blocks_are_not_the_mtp_block() -> None:
    """A DSpark config has no MTP block, and its drafts have what only drafts have."""
    config = with_drafts(tiny())
    assert config.num_nextn_predict_layers == 0
    assert not any(t.name.startswith("mtp.") for t in published_tensors(config))
    drafts = {t.name: t.shape for t in draft_tensors(config)}
    d, vocab = config.hidden_size, config.vocab_size
    assert drafts["mtp.0.main_proj.weight"] == (d, 3 * d)
    assert drafts["mtp.2.markov_head.markov_w1.weight"] == (vocab, 8)
    assert drafts["mtp.2.confidence_head.proj.weight"] == (1, d + 8)
    assert not any("e_proj" in n or "hnorm" in n or n.startswith("mtp.3") for n in drafts)
    published = config.to_published()
    assert published["num_nextn_predict_layers"] == 1
    assert DeepSeekV4Config.from_published(published) == config


@pytest.mark.parametrize("missing", ["dspark_markov_rank", "dspark_target_layer_ids"])
def test_incomplete_dspark_keys_are_refused(missing: str) -> None:
    """Shapes that the config does not determine are not guessed."""
    config = with_drafts(tiny())
    extra = {k: v for k, v in config.extra.items() if k != missing}
    with pytest.raises(CheckpointError, match=missing):
        draft_tensors(config.model_copy(update={"extra": extra}))


def test_an_odd_width_is_no_fp4() -> None:
    """Two codes share a byte."""
    with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight has 33 columns"):
        totals(tiny(moe_intermediate_size=33))
    assert totals(tiny(moe_intermediate_size=33), LAYOUTS["fp8"]).tensors


def test_files_are_numbered_as_the_release_does() -> None:
    assert shard_file(3, 46) == "model-00003-of-00046.safetensors"
