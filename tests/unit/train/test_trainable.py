"""Parameters are frozen by name, and what is frozen stays as it is to the last bit."""

import pytest
import torch

from fullweight.checkpoint.selection import ALL, select
from fullweight.core.errors import ConfigError
from fullweight.core.types import Batch, PackedLayout
from fullweight.methods import SFT
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.optim.groups import OptimizerConfig, build_optimizers
from fullweight.parallel.engine import PlainEngine
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard, GuardConfig
from fullweight.train.step import LossConfig, Phases, StepResult, training_step
from fullweight.train.trainable import ParameterCount, freeze, sharding_units

TINY = DeepSeekV4Config.preset("tiny")
CPU = torch.device("cpu")
INDEXER = {
    f"layers.{layer}.attn.indexer.{part}"
    for layer in (1, 3)
    for part in (
        "compressor.ape",
        "compressor.norm.weight",
        "compressor.wgate.weight",
        "compressor.wkv.weight",
        "wq_b.weight",
        "weights_proj.weight",
    )
}


def test_patterns_name_published_parameters() -> None:
    """The two CSA layers of `tiny` have the indexers; frozen is taken out of trainable."""
    assert select(TINY, ["*.indexer.*"], []) == INDEXER
    assert select(TINY, ["layers.1.attn.indexer.*"], ["*.ape", "*.compressor.w*"]) == {
        "layers.1.attn.indexer.compressor.norm.weight",
        "layers.1.attn.indexer.wq_b.weight",
        "layers.1.attn.indexer.weights_proj.weight",
    }
    everything = select(TINY, ALL, [])
    assert everything == {n for n, _ in DeepSeekV4(TINY).named_parameters()} | {
        f"{block}.ffn.gate.bias" for block in ("layers.1", "layers.2", "layers.3", "mtp.0")
    }
    assert everything - select(TINY, ALL, ["embed.weight", "head.weight"]) == {"embed.weight", "head.weight"}


def test_stacked_experts_are_taken_whole() -> None:
    """Published names of experts, the ledger's names of their stack, and both ways to miss a part."""
    stacked = {f"layers.0.ffn.experts.{part}" for part in ("gate_up", "down")}
    assert select(TINY, ["layers.0.ffn.experts.*"], []) == stacked
    assert select(TINY, ["layers.0.ffn.experts.*.w?.weight"], []) == stacked
    assert select(TINY, ["layers.0.ffn.experts.gate_up"], []) == {"layers.0.ffn.experts.gate_up"}
    with pytest.raises(ConfigError, match=r"names 2 of the 16 matrices .*name them all: layers.0.ffn.experts.\*"):
        select(TINY, ["layers.0.ffn.experts.3.w[13].weight"], [])
    with pytest.raises(ConfigError, match=r"train.frozen .*names 8 of the 16 matrices"):
        select(TINY, ALL, ["layers.0.ffn.experts.*.w1.weight"])


@pytest.mark.parametrize(
    ("trainable", "frozen", "said"),
    [
        (
            ["*.indexr.*"],
            [],
            r"train.trainable: '\*.indexr.\*' matches no parameter; nearest: layers.\*.attn.indexer",
        ),
        (["*"], ["lm_head.weight"], "train.frozen: 'lm_head.weight' matches no parameter; nearest: head.weight"),
        (["*.tid2eid"], [], "matches no parameter"),
        (["*.gate.bias"], [], "leaves no parameter to train"),
        (["mtp.*"], ["*"], "leaves no parameter to train"),
    ],
)
def test_what_matches_nothing_is_refused(trainable: list[str], frozen: list[str], said: str) -> None:
    """A pattern with a typing mistake would train the wrong parameters in silence."""
    with pytest.raises(ConfigError, match=said):
        select(TINY, trainable, frozen)


def step(model: DeepSeekV4, optimizers: list[torch.optim.Optimizer]) -> StepResult:
    """One step of training on a document that reaches every parameter."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TINY.vocab_size, (192,), generator=generator)
    batch = Batch(tokens, torch.ones(192), PackedLayout.build([150, 42], TINY.ratios))
    result = training_step(
        model,
        SFT(),
        optimizers,
        [batch],
        engine=PlainEngine(model),
        losses=LossConfig(),
        clip_norm=1.0,
        guard=Guard(GuardConfig()),
        ranks=Ranks(0, 1, CPU),
        phases=Phases(CPU),
    )
    assert result.refusal is None
    return result


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        (["*.indexer.*"], []),
        (["*"], ["*.ffn.gate.*"]),
        (["*"], ["embed.weight", "head.weight", "*.indexer.*", "*.ffn.experts.*"]),
        (["mtp.*"], []),
        (["layers.2.*", "layers.1.ffn.gate.bias"], []),
        (["*norm.weight"], []),
        (["head.weight"], []),
    ],
    ids=str,
)
def test_only_the_chosen_move(trainable: list[str], frozen: list[str]) -> None:
    """After two steps every chosen tensor has moved and no other, in bits; only the chosen have moments."""
    chosen = select(TINY, trainable, frozen)
    model = initialise(DeepSeekV4(TINY, torch.bfloat16, indexer_loss="visible"))
    model.dense_csa = True
    freeze(model, chosen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5)
    optimizers = build_optimizers(model, model.parameter_roles(), config)
    results = [step(model, optimizers) for _ in range(2)]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == chosen
    assert all(p.grad is None for p in model.parameters())
    held = {id(p) for o in optimizers for p in o.state}
    assert held == {id(p) for n, p in model.named_parameters() if n in chosen}
    assert results[0].without_gradient == ()
    assert set(results[0].losses) == {"lm", "mtp", "indexer", "balance"}
    count = ParameterCount.of(model)
    assert count.total == TINY.num_parameters(mtp=True)
    assert count.trained == sum(p.numel() for n, p in model.named_parameters() if n in chosen)
    assert f"{count.trained:,} trained" in str(count)


def test_frozen_parameters_get_no_gradient_even_for_a_moment() -> None:
    """No gradient tensor exists after backward, before any optimiser is involved."""
    model = initialise(DeepSeekV4(TINY, indexer_loss="visible"))
    freeze(model, select(TINY, ["*.indexer.*"], []))
    batch = Batch(torch.arange(160), torch.ones(160), PackedLayout.build([160], TINY.ratios))
    model(batch).losses["indexer"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == INDEXER


def test_indexers_are_sharded_alone_only_where_no_gradient_passes() -> None:
    """Layer 2 trains whole: layer 1's indexer sees no gradient in its streams, layer 3's does."""
    model = DeepSeekV4(TINY, ops="reference")
    blocks = [*model.layers, *model.mtp]
    assert sharding_units(model) == blocks
    freeze(model, select(TINY, ["*.indexer.*", "layers.2.*"], []))
    assert sharding_units(model) == [model.layers[1].attn.indexer, *blocks]
    freeze(model, select(TINY, ["layers.2.*"], []))
    assert sharding_units(model) == blocks
