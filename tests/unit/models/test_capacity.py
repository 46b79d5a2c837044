"""A capacity of experts, against loops over one choice after another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullweight.core.types import Batch
from fullweight.models.deepseek_v4.capacity import within_capacity
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.moe import MoE
from fullweight.models.deepseek_v4.tokens import WHOLE_ROW
from fullweight.ops import available_operations, resolve_operations

from .cases import draw_documents, make_batch, randomise

LENGTHS, ROW = (5, 30, 9), 64  # 44 real tokens in a row of 64


def kept_one_by_one(chosen: Tensor, weights: Tensor, valid: Tensor, capacity: int) -> Tensor:
    """Each expert takes the best choice that is left, the first of equal ones, until it is full."""
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    worth = torch.where(valid.unsqueeze(1), weights, -1.0).tolist()
    for expert in chosen.unique().tolist():
        waiting = [(t, k) for t, row in enumerate(chosen.tolist()) for k, x in enumerate(row) if x == expert]
        for _ in range(min(capacity, len(waiting))):
            best = waiting[0]
            for t, k in waiting[1:]:
                if worth[t][k] > worth[best[0]][best[1]]:
                    best = t, k
            kept[best] = True
            waiting.remove(best)
    return kept


@pytest.mark.parametrize("capacity", [1, 3, 7, 1000])
def test_the_best_choices_stay(capacity: int) -> None:
    """Also among equal weights, of which the earlier stays, and beside padding, which comes last."""
    generator = torch.Generator().manual_seed(capacity)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(40)])
    weights = torch.randint(1, 6, (40, 2), generator=generator) / 4
    valid = torch.arange(40) < 30
    found = within_capacity(chosen, weights, valid, 5, capacity, WHOLE_ROW)
    assert torch.equal(found, kept_one_by_one(chosen, weights, valid, capacity))
    assert int(torch.bincount(chosen[found], minlength=5).max()) <= capacity


def batch_and_model(factor: float | None, ops: str = "reference") -> tuple[Batch, DeepSeekV4]:
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny", vocab_size=40), ops=ops)
    randomise(model, 0)
    model.set_expert_capacity(factor)
    return make_batch(draw_documents(model, LENGTHS, 3), model.config, ROW), model


@pytest.mark.parametrize("ops", available_operations())
@pytest.mark.parametrize("layer", [0, 2])
def test_experts_without_what_was_dropped(ops: str, layer: int) -> None:
    """Output and gradients of a hash and a scored layer are those of a float64 loop over the choices kept."""
    batch, model = batch_and_model(0.6, ops)
    moe, config = model.layers[layer].ffn, model.config
    assert isinstance(moe, MoE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROW, config.hidden_size, generator=generator).requires_grad_()
    grad = torch.randn(ROW, config.hidden_size, generator=generator)
    context = model.context(batch.tokens, batch.layout, with_losses=True)
    moe(x, context).backward(grad)
    found = {"x": x.grad} | {name: p.grad for name, p in moe.named_parameters()}
    [dropped], [counts] = context.aux.dropped, context.aux.expert_counts

    exact = MoE(config, resolve_operations("reference"), layer < config.num_hash_layers).double()
    exact.load_state_dict(moe.state_dict())
    wide = x.detach().double().requires_grad_()
    _, chosen, weights = exact.gate(wide, batch.tokens)
    capacity = math.ceil(0.6 * ROW * config.num_experts_per_tok / config.n_routed_experts)
    valid = torch.arange(ROW) < sum(LENGTHS)
    kept = kept_one_by_one(chosen, weights.detach(), valid, capacity)
    assert int(dropped) == int((~kept[valid]).sum()) > 0
    assert torch.equal(counts, torch.bincount(chosen[valid].flatten(), minlength=config.n_routed_experts))
    rows = []
    for t in range(ROW):
        row = exact.shared_experts(wide[t : t + 1])[0]
        for k, expert in enumerate(chosen[t].tolist()):
            if kept[t, k]:
                hidden = exact.experts.ops.swiglu(exact.experts.gate_up[expert] @ wide[t], config.swiglu_limit)
                row = row + weights[t, k] * (exact.experts.down[expert] @ hidden)
        rows.append(row)
    torch.stack(rows).backward(grad.double())
    expected = {"x": wide.grad} | {name: p.grad for name, p in exact.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None, name
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("ops", available_operations())
def test_room_for_all_drops_nothing(ops: str) -> None:
    """An expert is chosen at most once by a token: experts / K times the even share is dropless, bit for bit."""
    results = []
    for factor in (None, 4.0):
        batch, model = batch_and_model(factor, ops)
        output = model(batch)
        sum(output.losses.values(), torch.zeros(())).backward()
        assert output.dropped.tolist() == [0] * 5
        results.append((output.losses, {n: p.grad for n, p in model.named_parameters()}))
    (losses, gradients), (others, other_gradients) = results
    assert losses == others
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.equal(other_gradients[name], gradient), name


def test_only_training_passes_drop() -> None:
    """Without gradients the losses are the dropless ones; remaking activations changes nothing."""
    batch, dropless = batch_and_model(None)
    _, model = batch_and_model(0.5)
    trained = model(batch)
    assert trained.dropped.min() > 0
    with torch.no_grad():
        held_out = model(batch)
        assert not held_out.dropped.any()
        assert torch.equal(held_out.losses["lm"], dropless(batch).losses["lm"])
    assert not torch.equal(trained.losses["lm"], held_out.losses["lm"])
    model.set_recompute("full")
    again = model(batch)
    assert torch.equal(again.dropped, trained.dropped)
    assert again.losses == trained.losses
