"""FLOPs and parameters against published figures, a loop over tokens, torch's counter on transformers."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fullweight.core.errors import DataError, FullweightError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import (
    forward_flops,
    model_flops_utilisation,
    parameters_by_component,
    training_flops,
    training_flops_per_token,
)

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 130, 255, 256, 257, 400]

# GF per token, one document of S tokens: forward, training, training with dense CSA (facts, section 4.2).
PUBLISHED = {
    "flash": {
        4096: (28.5, 84.4, 84.8),
        16384: (29.5, 86.1, None),
        65536: (32.2, 89.9, 150),
        262144: (42.6, 104.5, None),
        1048576: (84.5, 162.5, 1195),
    },
    "pro": {
        4096: (104.2, 310.0, 308.7),
        16384: (108.4, 321.0, None),
        65536: (113.7, 331.0, 496),
        262144: (132.2, 362.4, None),
        1048576: (205.5, 485.7, 3489),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name: str) -> None:
    """Forward, training and dense-CSA GF per token of Flash and Pro to the last printed digit.

    0.06 rather than 0.05: the table takes an HCA token's mean entries as S/256, half an entry above the exact
    mean, which is 0.004 GF for Pro and turns 108.348 into 108.4.
    """
    config = DeepSeekV4Config.preset(name)
    for length, (forward, training, dense) in PUBLISHED[name].items():
        counted = forward_flops(config, [length], mtp=False).total / length / 1e9
        assert counted == pytest.approx(forward, abs=0.06)
        counted = training_flops_per_token(config, [length], mtp=False, indexer_loss="none") / 1e9
        assert counted == pytest.approx(training, abs=0.06)
        if dense is not None:
            counted = training_flops_per_token(config, [length], mtp=False, indexer_loss="none", dense_csa=True)
            assert counted / 1e9 == pytest.approx(dense, abs=0.06 if dense % 1 else 0.5)


def test_published_mtp_figure() -> None:
    """MTP adds 6 x (319M + head 530M) for Flash with each d x d projection once; here the hidden-state
    projection runs on each of the four streams."""
    config = DeepSeekV4Config.preset("flash")
    added = training_flops(config, [4096]).mtp / 4096
    streams = 6 * 3 * 4096**2
    attention = 12 * 512 * 64 * 126.015625  # mean keys of the window over 4,096 tokens
    mixing = 3 * (2 * (2 * 4 + 2 * 16 + 2 * 4) + 2 * 4) * 4096
    assert added - streams - attention - mixing == pytest.approx(
        6 * (319e6 + 530e6), abs=6 * 1e6
    )  # both rounded to 1M


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "flash",
            {
                "embed": 529_530_880,
                "head": 529_530_880,
                "q_a": 180.36e6,
                "q_b": 1442.84e6,
                "kv": 90.18e6,
                "o_a": 1442.84e6,
                "o_b": 1442.84e6,
                "csa_compressor": 176.26e6,
                "hca_compressor": 85.21e6,
                "indexer": 225.73e6,
                "router": 45.09e6,
                "routed_experts": 277_025_390_592,
                "shared_expert": 1_082_130_432,
                "hyper_connections": 33_884_439,
                "mtp": 6_610_048_635,
            },
        ),
        (
            "pro",
            {
                "embed": 926_679_040,
                "head": 926_679_040,
                "q_a": 671.61e6,
                "q_b": 6140.46e6,
                "kv": 223.87e6,
                "o_a": 4093.64e6,
                "o_b": 7163.87e6,
                "csa_compressor": 440.54e6,
                "hca_compressor": 229.59e6,
                "indexer": 501.38e6,
                "router": 167.90e6,
                "routed_experts": 1_547_396_186_112,
                "shared_expert": 4_029_677_568,
                "hyper_connections": 84_069_603,
                "mtp": 25_840_145_595,
            },
        ),
    ],
)
def test_published_parameters_by_component(name: str, expected: dict[str, float]) -> None:
    """Each row of the published table, the rounded ones to their last digit; nothing is left uncounted."""
    config = DeepSeekV4Config.preset(name)
    counted = parameters_by_component(config)
    assert set(counted) - set(expected) == {"norms_and_sinks"}
    for component, value in expected.items():
        assert counted[component] == pytest.approx(value, abs=0 if isinstance(value, int) else 5001)
    assert sum(counted.values()) == config.num_parameters(mtp=True)
    assert sum(counted.values()) - counted["mtp"] == config.num_parameters(mtp=False)


def _pairs_by_loop(config: DeepSeekV4Config, lengths: list[int]) -> dict[str, int]:
    """Query-key pairs, one token and one key at a time, straight from the visibility rules."""
    pairs = dict.fromkeys(["window", "csa_visible", "csa_selected", "hca"], 0)
    for length in lengths:
        ends = {ratio: range(ratio - 1, length, ratio) for ratio in (4, 128)}  # last token of each window
        for t in range(length):
            pairs["window"] += sum(t - config.sliding_window < s <= t for s in range(length))
            visible = sum(end <= t for end in ends[4])
            pairs["csa_visible"] += visible
            pairs["csa_selected"] += min(visible, config.index_topk)
            pairs["hca"] += sum(end <= t for end in ends[128])
    return pairs


@pytest.mark.parametrize("lengths", [[n] for n in LENGTHS] + [LENGTHS])
def test_attention_against_a_loop_over_tokens(lengths: list[int]) -> None:
    """Closed forms equal a literal count of pairs, alone and summed over a pack of documents."""
    config = DeepSeekV4Config.preset("tiny")  # 4 layers: sliding, CSA, HCA, CSA; top-k 8; 4 heads of 32
    pairs = _pairs_by_loop(config, lengths)
    value = 4 * 32 * 4
    score = 2 * 8 * 16
    forward = forward_flops(config, lengths)
    assert forward.window_attention == 4 * value * pairs["window"]
    assert forward.csa_attention == 2 * value * pairs["csa_selected"]
    assert forward.hca_attention == value * pairs["hca"]
    assert forward.indexer_scores == 2 * score * pairs["csa_visible"]
    dense = forward_flops(config, lengths, dense_csa=True)
    assert dense.csa_attention == 2 * value * pairs["csa_visible"]
    assert dense.indexer_scores == dense.indexer_projections == 0
    selected = training_flops(config, lengths, indexer_loss="selected")
    assert selected.indexer_scores == 2 * score * (pairs["csa_visible"] + 2 * pairs["csa_selected"])
    assert selected.indexer_loss == 0
    assert selected.indexer_projections == 2 * forward.indexer_projections
    visible = training_flops(config, lengths, indexer_loss="visible")
    assert visible.indexer_scores == 2 * score * 3 * pairs["csa_visible"]
    assert visible.indexer_loss == 2 * (value // 2) * (pairs["csa_visible"] - pairs["csa_selected"])
    warm_up = training_flops(config, lengths, indexer_loss="visible", dense_csa=True)
    assert warm_up.indexer_loss == 0
    assert warm_up.indexer_scores == visible.indexer_scores
    frozen = training_flops(config, lengths, indexer_loss="none")
    for component, amount in frozen.as_dict().items():
        factor = 1 if component.startswith("indexer") else 3
        assert amount == factor * getattr(forward, component)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_a_pack_costs_the_sum_of_its_documents(lengths: list[int]) -> None:
    """No cost crosses a document boundary, and the order of the documents does not matter."""
    config = DeepSeekV4Config.preset("bench")
    alone = [training_flops(config, [n], indexer_loss="visible") for n in lengths]
    packed = training_flops(config, lengths[::-1], indexer_loss="visible")
    for component, amount in packed.as_dict().items():
        assert amount == sum(getattr(part, component) for part in alone)


@pytest.mark.parametrize(("name", "experts"), [("tiny", 2), ("small", 2)])
def test_one_token_against_the_flop_counter_on_transformers(name: str, experts: int) -> None:
    """On one token torch's counter sees every product of the transformers model; what it does not see is
    elementwise: the streams' weighted sum and spreading (2nd each a sublayer), the last collapse (2nd)."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepSeekV4Config.preset(name)
    other = DeepseekV4Config(**config.to_published(), attn_implementation="eager")
    other._experts_implementation = "eager"
    model = DeepseekV4ForCausalLM(other).float()
    for block in model.model.layers:  # the hash table starts as zeros, one expert for all slots
        if hasattr(block.mlp.gate, "tid2eid"):
            block.mlp.gate.tid2eid[:] = torch.arange(experts)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[3]]), use_cache=False)
    elementwise = (2 * config.num_hidden_layers * 2 + 1) * 2 * config.hc_mult * config.hidden_size
    assert forward_flops(config, [1], mtp=False).total == counter.get_total_flops() + elementwise


def test_a_million_tokens_is_closed_form() -> None:
    """A token more at 2^20 adds exactly that token's pairs: no rounding at the largest length."""
    config = DeepSeekV4Config.preset("pro")
    longer, shorter = (forward_flops(config, [n]) for n in (2**20, 2**20 - 1))
    pair = 4 * 512 * 128
    assert longer.hca_attention - shorter.hca_attention == 31 * pair * 2**13
    assert longer.csa_attention - shorter.csa_attention == 30 * pair * 1024
    assert longer.window_attention - shorter.window_attention == 61 * pair * 128
    assert longer.indexer_scores - shorter.indexer_scores == 30 * 2 * 64 * 128 * 2**18


def test_a_config_without_mtp_or_compression_has_none_of_their_cost() -> None:
    """Absent parts cost nothing, and the parameter split still sums to the total."""
    config = DeepSeekV4Config.preset("tiny", num_nextn_predict_layers=0, compress_ratios=[0, 0, 0, 0])
    flops = training_flops(config, [300, 7], indexer_loss="visible").as_dict()
    assert {name for name, value in flops.items() if value == 0} == {
        "csa_attention",
        "hca_attention",
        "compressors",
        "indexer_projections",
        "indexer_scores",
        "indexer_loss",
        "mtp",
    }
    assert sum(parameters_by_component(config).values()) == config.num_parameters(mtp=True)
    with_mtp = DeepSeekV4Config.preset("tiny")
    assert training_flops(with_mtp, [300], mtp=False).mtp == 0


@pytest.mark.parametrize("lengths", [[], [0], [5, -1], [128, 0, 3]])
def test_empty_documents_are_refused(lengths: list[int]) -> None:
    """No documents or an empty one is an error that shows the lengths, never a division by zero."""
    config = DeepSeekV4Config.preset("tiny")
    for count in (forward_flops, training_flops, training_flops_per_token):
        with pytest.raises(DataError, match=r"at least one token, found lengths \["):
            count(config, lengths)


def test_model_flops_utilisation() -> None:
    """A plain share of the peak; a peak of zero is refused."""
    assert model_flops_utilisation(210e9, 420e9) == 0.5
    with pytest.raises(FullweightError, match="peak must be positive"):
        model_flops_utilisation(1.0, 0.0)


def test_imports_without_torch() -> None:
    """`import fullweight.models.deepseek_v4.flops` works, and counts, where torch cannot be imported."""
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "numpy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
import fullweight.models.deepseek_v4.flops as flops
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
assert flops.training_flops_per_token(DeepSeekV4Config.preset("flash"), [4096]) > 84e9
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
