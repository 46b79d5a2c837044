"""Activations that are made again: the same bits, less memory, nothing reported twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.allocations import Allocations
from torch import Tensor

from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Auxiliary, Context
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

CONFIG = DeepSeekV4Config.preset("tiny")
POLICIES = ("none", "selective", "full")


def row(tokens: int = 512) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, CONFIG.vocab_size, (tokens,), generator=generator)
    lengths = [300, 1, 129, tokens - 450]
    return Batch(ids, torch.ones(tokens), PackedLayout.build(lengths, CONFIG.ratios, tokens))


def build(policy: str, dtype: torch.dtype = torch.float32, ops: str = "auto") -> DeepSeekV4:
    model = initialise(DeepSeekV4(CONFIG, dtype, ops=ops))
    model.set_recompute(policy)  # type: ignore[arg-type]
    return model


def gradients(model: DeepSeekV4) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad


@pytest.mark.parametrize("ops", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same(dtype: torch.dtype, ops: str) -> None:
    """Losses, counts and every gradient, two micro-batches long."""
    models = {policy: build(policy, dtype, ops) for policy in POLICIES}
    found = {}
    for policy, model in models.items():
        for _ in range(2):
            output = model(row())
            sum(output.losses.values()).backward()
        found[policy] = output
    for policy in POLICIES[1:]:
        for name, value in found["none"].losses.items():
            assert torch.equal(found[policy].losses[name], value), name
        assert torch.equal(found[policy].expert_counts, found["none"].expert_counts)
        for (name, gradient), (_, expected) in zip(
            gradients(models[policy]), gradients(models["none"]), strict=True
        ):
            assert torch.equal(gradient, expected), (policy, name)


def kept_bytes(model: DeepSeekV4) -> int:
    """What a forward pass leaves for backward, without the parameters."""
    batch = row()
    with Allocations([*model.parameters(), *model.buffers(), batch.tokens]) as counted:
        output = model(batch)
        kept = counted.live
    del output
    return kept


def test_memory_falls_with_every_policy() -> None:
    """Experts made again save their hidden rows; whole blocks save all but their inputs."""
    kept = {policy: kept_bytes(build(policy)) for policy in POLICIES}
    hidden = 512 * CONFIG.num_experts_per_tok * 2 * CONFIG.moe_intermediate_size * 4
    blocks = CONFIG.num_hidden_layers + 1
    assert kept["none"] - kept["selective"] >= blocks * hidden
    streams = 512 * CONFIG.hc_mult * CONFIG.hidden_size * 4
    # blocks keep their streams; beside them are the head's gradients, embeddings, tables and what MTP adds
    assert kept["full"] <= kept["none"] / 2
    assert kept["full"] >= blocks * streams, "the inputs of blocks are kept"


def test_a_frozen_start_keeps_its_own() -> None:
    """With gradients in the last block's experts alone, only that block and MTP are made again."""
    model = initialise(DeepSeekV4(CONFIG))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.3.ffn"))
    model.set_recompute("full")
    assert [block.recompute for block in (*model.layers, *model.mtp)] == [False, False, False, True, True]
    sum(model(row()).losses.values()).backward()
    plain = initialise(DeepSeekV4(CONFIG))
    sum(plain(row()).losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


def test_nothing_is_reported_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward makes again adds to no loss and no count."""
    contexts: list[Context] = []
    build_context = Context.build

    def keep(*arguments: object, **options: object) -> Context:
        contexts.append(build_context(*arguments, **options))  # type: ignore[arg-type]
        return contexts[-1]

    monkeypatch.setattr(Context, "build", keep)
    model = build("full")
    sum(model(row()).losses.values()).backward()
    [context] = contexts
    blocks = CONFIG.num_hidden_layers + 1
    assert len(context.aux.expert_counts) == blocks
    assert len(context.aux.balance) == blocks - CONFIG.num_hash_layers
    assert len(context.aux.indexer) == 2


def test_what_is_muted_is_forgotten() -> None:
    """Also when the pass ends early, as soon as backward has what it needs."""
    aux = Auxiliary()
    aux.balance.append(torch.ones(()))

    def pass_that_ends_early() -> None:
        with aux.muted():
            aux.balance.append(torch.ones(()))
            aux.indexer.append(torch.ones(()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pass_that_ends_early()
    assert (len(aux.balance), len(aux.indexer)) == (1, 0)
