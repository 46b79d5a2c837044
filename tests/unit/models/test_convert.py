"""Names: ours to the published ones and back, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import from_published, stacks, to_published
from fullweight.models.deepseek_v4.model import DeepSeekV4

from .cases import randomise


def _model(**changes: object) -> DeepSeekV4:
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny", **changes))
    randomise(model, 0)
    return model


def _published_block(prefix: str, ratio: int, hashed: bool, experts: int) -> set[str]:
    """Names of one block as the release's table lists them."""
    attention = ["attn_sink", "q_norm.weight", "kv_norm.weight"]
    attention += [f"{w}.weight" for w in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
    compressor = ["wkv.weight", "wgate.weight", "ape", "norm.weight"]
    if ratio:
        attention += [f"compressor.{n}" for n in compressor]
    if ratio == 4:
        attention += [f"indexer.compressor.{n}" for n in compressor]
        attention += ["indexer.wq_b.weight", "indexer.weights_proj.weight"]
    names = {f"{prefix}.attn.{n}" for n in attention} | {f"{prefix}.attn_norm.weight", f"{prefix}.ffn_norm.weight"}
    names |= {f"{prefix}.hc_{s}_{p}" for s in ("attn", "ffn") for p in ("fn", "base", "scale")}
    names |= {f"{prefix}.ffn.gate.weight", f"{prefix}.ffn.gate.{'tid2eid' if hashed else 'bias'}"}
    holders = [f"experts.{e}" for e in range(experts)] + ["shared_experts"]
    return names | {f"{prefix}.ffn.{h}.{w}.weight" for h in holders for w in ("w1", "w2", "w3")}


def test_names_are_the_published_ones() -> None:
    """Exactly the names of the release's table, with MTP and without."""
    model = _model()
    expected = {"embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    for i, ratio in enumerate([0, 4, 128, 4]):
        expected |= _published_block(f"layers.{i}", ratio, i == 0, 8)
    assert to_published(_model(num_nextn_predict_layers=0).state_dict(), model.config).keys() == expected
    expected |= _published_block("mtp.0", 0, False, 8)
    expected |= {f"mtp.0.{n}.weight" for n in ("e_proj", "h_proj", "enorm", "hnorm", "norm")}
    expected |= {f"mtp.0.hc_head_{p}" for p in ("fn", "base", "scale")}
    assert to_published(model.state_dict(), model.config).keys() == expected


def test_there_and_back_is_exact() -> None:
    """Every tensor returns bit for bit, with its dtype, and the published side does too."""
    model = _model()
    ours = model.state_dict()
    published = to_published(ours, model.config)
    back = from_published(published, model.config)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    again = to_published(back, model.config)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[n], published[n]) for n in published)


def test_expert_parts_lie_where_the_contract_says() -> None:
    """gate_up holds w1's rows first, then w3's; down is w2; expert by expert."""
    model = _model()
    ours, config = model.state_dict(), model.config
    published = to_published(ours, config)
    f = config.moe_intermediate_size
    for e in (0, 5):
        part = f"layers.2.ffn.experts.{e}"
        stacked = ours["layers.2.ffn.experts.gate_up"][e]
        assert torch.equal(published[f"{part}.w1.weight"], stacked[:f])
        assert torch.equal(published[f"{part}.w3.weight"], stacked[f:])
        assert torch.equal(published[f"{part}.w2.weight"], ours["layers.2.ffn.experts.down"][e])
    shared = ours["mtp.0.ffn.shared_experts.gate_up"]
    assert torch.equal(published["mtp.0.ffn.shared_experts.w3.weight"], shared[f:])


def test_splitting_copies_nothing() -> None:
    """Published parts are views of the stacks: no second copy of a large model's experts."""
    model = _model()
    published = to_published(model.state_dict(), model.config)
    part, stack = published["layers.1.ffn.experts.3.w2.weight"], model.state_dict()["layers.1.ffn.experts.down"]
    assert part.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


def test_a_missing_expert_is_named() -> None:
    """The message names the first part that is missing and the tensor it belongs to."""
    model = _model()
    published = to_published(model.state_dict(), model.config)
    del published["layers.2.ffn.experts.7.w3.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.7\.w3\.weight"):
        from_published(published, model.config)


def test_copies_of_embedding_and_head_in_the_mtp_block_are_ignored() -> None:
    """Released checkpoints may carry them; they are shared, so they are dropped on import."""
    model = _model()
    published = to_published(model.state_dict(), model.config)
    extra = {"mtp.0.emb.tok_emb.weight": torch.zeros(2), "mtp.0.head.weight": torch.zeros(2)}
    assert from_published({**published, **extra}, model.config).keys() == model.state_dict().keys()


def test_stacks_of_a_released_model() -> None:
    """Four operations a block, MTP included; each expert has three published matrices."""
    config = DeepSeekV4Config.preset("flash")
    operations = stacks(config)
    assert len(operations) == 4 * 44
    assert sum(len(list(s.names())) for s in operations) == 44 * 257 * 3
