"""Fresh weights: values by rule, the same for the same seed, hash tables balanced."""

from __future__ import annotations

import itertools

import pytest
import torch

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import FreshTensor, hash_table, initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4


def _fresh(seed: int, name: str = "tiny", **changes: object) -> DeepSeekV4:
    return initialise(DeepSeekV4(DeepSeekV4Config.preset(name, **changes)), seed)


def test_values_follow_the_rule() -> None:
    """Norms one, sinks and biases zero, mHC scale 0.01, matrices N(0, initializer_range^2); nothing left out."""
    model = _fresh(0, "small")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("_scale"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.01)), name
        elif name.endswith(("_base", "ape", "attn_sink")):
            assert not parameter.any(), name
        else:
            # five standard errors of a standard deviation from n values
            tolerance = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.02, rel=tolerance), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / parameter.numel() ** 0.5, name
    assert all(not b.any() for n, b in model.named_buffers() if n.endswith("bias"))


def test_uninitialised_memory_is_overwritten() -> None:
    """A model built of NaN is finite after `initialise`."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    initialise(model, 0)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_a_seed_fixes_every_tensor() -> None:
    """Same seed same bits; another seed, or another tensor of the same shape, other values."""
    one, same, other = (_fresh(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["layers.0.attn.wkv.weight"], other["layers.0.attn.wkv.weight"])
    assert not torch.equal(one["layers.0.attn.wkv.weight"], one["layers.1.attn.wkv.weight"])
    assert not torch.equal(one["layers.0.ffn.gate.tid2eid"], other["layers.0.ffn.gate.tid2eid"])
    # a tensor's values depend on its name and the seed alone, not on what else the model has
    shorter = _fresh(1, num_hidden_layers=2, compress_ratios=[0, 4, 0]).state_dict()
    assert all(torch.equal(one[n], shorter[n]) for n in shorter)


@pytest.mark.parametrize("shape", [(7, 5), (3, 5), (40, 33), (129, 16), (5, 12, 10), (4, 3, 7), (2, 1, 1)])
def test_parts_have_the_bits_of_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn a few rows at a time and cut anywhere, a matrix has the numbers of one `normal_` on all of it."""
    from fullweight.models.deepseek_v4 import init

    monkeypatch.setattr(init, "_DRAWN_BYTES", 256)
    config, name = DeepSeekV4Config.preset("tiny"), "layers.1.ffn.x"
    generator = torch.Generator().manual_seed(init._generator(3, name).initial_seed())
    whole = torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
    for dim in range(len(shape)):
        for parts in (1, 2, 3):
            size = -(-shape[dim] // parts)
            for start in range(0, shape[dim], size):
                offset = [0] * len(shape)
                offset[dim] = start
                expected = whole.narrow(dim, start, min(size, shape[dim] - start))
                part = torch.full_like(expected, float("nan"))
                init.fill_part(name, part, tuple(offset), shape, config, 3)
                assert torch.equal(part, expected), (dim, parts, start)


def test_first_weights_are_the_same_numbers_in_every_precision() -> None:
    """So that a run in fp64 can be shown to have begun with them."""
    config = DeepSeekV4Config.preset("tiny")
    narrow = initialise(DeepSeekV4(config, ops="reference"), 5).state_dict()
    wide = initialise(DeepSeekV4(config, ops="reference").double(), 5).state_dict()
    for name, tensor in narrow.items():
        assert torch.equal(wide[name], tensor.to(wide[name].dtype)), name


@pytest.mark.parametrize(("vocab", "experts", "k"), [(512, 8, 2), (129, 7, 3), (64, 6, 6), (10, 16, 6)])
def test_hash_table_is_balanced_and_distinct(vocab: int, experts: int, k: int) -> None:
    """Each token has k distinct experts, loads over the vocabulary differ by at most k, layers differ."""
    table = hash_table(vocab, experts, k, 0, "layers.0.ffn.gate.tid2eid")
    assert table.shape == (vocab, k)
    assert table.dtype == torch.int64
    assert table.min() >= 0
    assert table.max() < experts
    assert all(len(set(row)) == k for row in table.tolist())
    loads = torch.bincount(table.flatten(), minlength=experts)
    assert loads.sum() == vocab * k
    assert loads.max() - loads.min() <= k
    if vocab > experts:
        assert loads.max() - loads.min() <= k
        assert loads.min() > 0
    assert not torch.equal(table, hash_table(vocab, experts, k, 0, "layers.1.ffn.gate.tid2eid"))


def test_neighbouring_tokens_do_not_share_their_experts() -> None:
    """Token ids that are near (a tokenizer's digits, say) are spread: most neighbours differ in their experts."""
    table = hash_table(512, 8, 2, 0, "layers.0.ffn.gate.tid2eid")
    same = (table[1:] == table[:-1]).all(1).float().mean()
    assert same < 0.3


def test_the_starting_loss_is_that_of_guessing() -> None:
    """A fresh model predicts nearly uniformly: its loss per token is within 2 % of log(vocabulary)."""
    from fullweight.core.types import Batch, PackedLayout

    model = _fresh(0)
    tokens = torch.randint(512, (256,), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones(256), PackedLayout.build([256], model.config.ratios))
    with torch.no_grad():
        loss = model(batch).losses["lm"].item() / 255
    assert loss == pytest.approx(torch.tensor(512.0).log().item(), rel=0.02)


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.gate_up", "embed.weight", "layers.1.ffn.gate.tid2eid"])
def test_rows_given_out_in_order_are_those_of_the_whole(name: str) -> None:
    """A tensor that is drawn row by row has `initialise`'s bits, stacks of experts counted through."""
    config = DeepSeekV4Config.preset("tiny", hidden_size=72, n_routed_experts=3, num_hash_layers=2)
    whole = initialise(DeepSeekV4(config, ops="reference"), 4).state_dict()[name]
    fresh, rows = FreshTensor(name, tuple(whole.shape), config, 4), whole.flatten(0, max(whole.dim() - 2, 0))
    bounds = [0, 1, 5, 60, 61, len(rows) - 1, len(rows)]
    found = [fresh.rows(first, last) for first, last in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(found), rows)
