"""The model against transformers' independent implementation, on small random configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, yarn_correction_range
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.rotary import frequencies
from fullweight.ops import available_operations

from .cases import BF16_CASES, Case, cases, draw_documents, make_batch, randomise
from .parity import measure, measure_bfloat16

# fp32 rounding through at most four layers is a few 1e-6 of the largest logit and a few 1e-5 of a gradient,
# worst where it nearly cancels, as the hyper-connections' of the first layer; a wrong term is far above.
LOGITS = 5e-5
GRADIENT = 2e-4

# bf16 rounds each intermediate by up to 2^-9 = 0.2 %; some thirty roundings in a row add up to about 1 %.
BF16_TYPICAL_TOKEN = 0.02
# Ours rounds no more often than transformers, so a typical token must not be worse. The means are ruled
# by the few tokens whose expert or entry flips, on either side by chance: hence its wider factor.
BF16_TYPICAL_FACTOR = 1.1
BF16_MEAN_FACTOR = 1.5


def test_cases_cover_what_the_contract_names() -> None:
    """At least 25 configurations with every kind, mix, group count, boundary length and pack size 1 to 20."""
    lengths = {n for case in cases() for n in case.lengths}
    assert len(cases()) >= 25
    assert {1, 3, 4, 5, 127, 128, 129, 257, 400} <= lengths
    assert {1, 20} <= {len(case.lengths) for case in cases()}
    assert {case.config.o_groups for case in cases()} == {1, 2, 4, 8}
    assert {r for case in cases() for r in case.config.compress_ratios} == {0, 4, 128}
    assert any(case.config.num_hash_layers == 0 for case in cases())
    assert any(case.config.num_hash_layers >= case.config.num_hidden_layers for case in cases())
    sparse = [c for c in cases() if 4 in c.config.compress_ratios and max(c.lengths) > 4 * c.config.index_topk]
    assert len(sparse) >= 10
    assert len([c for c in cases() if max(c.lengths) > c.config.sliding_window]) >= 20


@pytest.mark.parametrize("case", cases(), ids=str)
def test_logits_and_gradients_equal_transformers(case: Case) -> None:
    """A pack gives each document the logits, and all together the gradients, of separate calls."""
    for ops in available_operations():
        errors = measure(case, ops)
        assert errors.logits <= LOGITS, (ops, errors)
        assert errors.gradient <= GRADIENT, (ops, errors)


@pytest.mark.parametrize("number", BF16_CASES)
def test_bfloat16_is_no_worse_than_transformers(number: int, tmp_path: Path) -> None:
    """Each side's bf16 is compared with its own fp32, from the same bf16 weights."""
    errors = measure_bfloat16(cases()[number], tmp_path / "model")
    theirs = errors.pop("transformers")
    for ops, ours in errors.items():
        assert ours.typical_token <= BF16_TYPICAL_TOKEN, ops
        assert ours.typical_token <= BF16_TYPICAL_FACTOR * theirs.typical_token, ops
        assert ours.mean_square <= BF16_MEAN_FACTOR * theirs.mean_square, ops
        assert ours.gradient <= BF16_MEAN_FACTOR * theirs.gradient, ops


@pytest.mark.parametrize("ops", available_operations())
def test_a_document_does_not_see_its_neighbours(ops: str) -> None:
    """Another order of documents, other neighbours and padding leave each document's results the same."""
    case = cases()[24]
    model = DeepSeekV4(case.config, ops=ops)
    randomise(model, 24)
    documents = draw_documents(model, (131, 5, 1, 64, 3, 128, 4), 24)
    alone = [model.logits([d])[0] for d in documents]
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = model.logits([documents[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled[place], alone[i], rtol=0, atol=1e-4)
    packs = [make_batch(documents, case.config), make_batch([documents[i] for i in order], case.config, 400)]
    results = []
    for batch in packs:
        model.zero_grad()
        output = model(batch)
        sum(output.losses.values()).backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (one, gradients), (two, others) = results
    assert torch.equal(one.expert_counts, two.expert_counts)
    for name, value in one.losses.items():
        torch.testing.assert_close(two.losses[name], value, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-5, name


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_rotary_frequencies_equal_transformers(name: str) -> None:
    """The published config.json gives both sides the same tables; YaRN ramps from pair 15 to pair 25."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    config = DeepSeekV4Config.preset(name)
    rotary = DeepseekV4RotaryEmbedding(DeepseekV4Config.from_dict(config.to_published()))
    torch.testing.assert_close(frequencies(config, compressed=False), rotary.main_inv_freq, rtol=1e-6, atol=0)
    torch.testing.assert_close(frequencies(config, compressed=True), rotary.compress_inv_freq, rtol=1e-6, atol=0)
    assert yarn_correction_range(config) == (15, 25)
