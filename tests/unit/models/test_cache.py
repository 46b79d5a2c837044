"""Prefill and decode give the logits of the full forward; generation stops, samples and refuses as documented."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullweight.core.errors import ConfigError, DataError
from fullweight.models.deepseek_v4.cache import generate, sample
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import available_operations

from .cases import draw_documents, randomise

KINDS = {"sliding": [0, 0, 0], "csa": [4, 4, 0], "hca": [128, 128, 0], "mixed": [0, 4, 128, 4, 0]}


def _model(kind: str, ops: str = "auto", **changes: object) -> DeepSeekV4:
    ratios = KINDS[kind]
    config = DeepSeekV4Config.preset(
        "tiny",
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=len(ratios) - 1,
        compress_ratios=ratios,
        index_n_heads=32,
        index_topk=4,
        **changes,
    )
    model = DeepSeekV4(config, ops=ops)
    randomise(model, 7)
    return model


def _decode(model: DeepSeekV4, documents: list[list[int]], splits: list[int], steps: int) -> list[Tensor]:
    """Logits [steps + 1, V] of each document from its split on, all in one ragged batch.

    A document that ends early repeats its last token; its rows after the end mean nothing.
    """
    prompts = [d[:s] for d, s in zip(documents, splits, strict=True)]
    logits, cache = model.prefill(prompts, max(splits) + steps)
    rows = [[row] for row in logits]
    for step in range(steps):
        tokens = [d[min(s + step, len(d) - 1)] for d, s in zip(documents, splits, strict=True)]
        logits = model.decode(torch.tensor(tokens), cache)
        for collected, row in zip(rows, logits, strict=True):
            collected.append(row)
    return [torch.stack(collected) for collected in rows]


def _assert_equal(decoded: Tensor, full: Tensor, split: int) -> None:
    expected = full[split - 1 : split - 1 + len(decoded)]
    torch.testing.assert_close(decoded[: len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_split_point_gives_the_full_forward(kind: str) -> None:
    """A document of 44 tokens (window 16, CSA windows of 4) split after each token: all splits in one batch."""
    model = _model(kind)
    (document,) = draw_documents(model, (44,), 1)
    full = model.logits([document])[0]
    splits = list(range(1, 44))
    for split, decoded in zip(splits, _decode(model, [document] * 43, splits, 43), strict=True):
        _assert_equal(decoded, full, split)


@pytest.mark.parametrize("ops", available_operations())
@pytest.mark.parametrize(("split", "steps"), [(1, 139), (126, 4), (127, 4), (128, 4), (129, 4), (254, 4)])
def test_long_windows_close_while_decoding(ops: str, split: int, steps: int) -> None:
    """HCA windows end at 128 and 256: decoding starts before, on and after the end, and passes it."""
    model = _model("mixed", ops)
    (document,) = draw_documents(model, (260,), 2)
    full = model.logits([document])[0]
    _assert_equal(_decode(model, [document], [split], steps)[0], full, split)


def test_ragged_prompts_share_a_batch() -> None:
    """Prompts of 1, 3, 4, 127, 128 and 130 tokens decode 12 steps together as each would alone."""
    model = _model("mixed")
    lengths = [1, 3, 4, 127, 128, 130]
    documents = draw_documents(model, [n + 12 for n in lengths], 3)
    for document, split, rows in zip(documents, lengths, _decode(model, documents, lengths, 12), strict=True):
        _assert_equal(rows, model.logits([document])[0], split)


@pytest.mark.parametrize("ops", available_operations())
def test_bfloat16_decodes_like_its_full_forward(ops: str) -> None:
    """In bf16 both paths round, differently: a typical step stays within the 2 % of parity's bf16 bound."""
    exact = _model("mixed")
    model = DeepSeekV4(exact.config, torch.bfloat16, ops=ops)
    model.load_state_dict(exact.state_dict())
    (document,) = draw_documents(exact, (140,), 8)
    full = model.logits([document])[0][119:]
    decoded = _decode(model, [document], [120], 20)[0]
    assert decoded.dtype == torch.float32
    error = (decoded - full).square().mean(-1).sqrt().median() / full.square().mean().sqrt()
    assert error <= 0.02


def test_more_entries_wanted_than_exist() -> None:
    """An index_topk above the number of entries attends to all of them, cached or not."""
    config = _model("csa").config.model_copy(update={"index_topk": 1000})
    model = DeepSeekV4(config)
    randomise(model, 7)
    (document,) = draw_documents(model, (30,), 4)
    full = model.logits([document])[0]
    _assert_equal(_decode(model, [document], [9], 20)[0], full, 9)


def test_a_full_cache_is_refused() -> None:
    """Decoding past the capacity that the cache was made for raises instead of overwriting."""
    model = _model("mixed")
    _, cache = model.prefill([[1, 2, 3]], 4)
    model.decode(torch.tensor([4]), cache)
    with pytest.raises(DataError, match="4 tokens"):
        model.decode(torch.tensor([5]), cache)


def _greedy(model: DeepSeekV4, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits([tokens])[0][-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_generation_repeats_the_full_forward() -> None:
    """temperature 0 gives, for each prompt of a batch, what argmax over full forwards gives it alone."""
    model = _model("mixed")
    prompts = draw_documents(model, (5, 1, 17), 5)
    produced = generate(model, prompts, 10)
    assert produced == [_greedy(model, p, 10) for p in prompts]
    assert generate(model, prompts, 0) == [[], [], []]
    assert generate(model, prompts, 1) == [p[:1] for p in produced]


def test_a_stop_id_ends_its_own_sequence() -> None:
    """The stop id is included, the others go on, and the output before it is unchanged."""
    model = _model("mixed")
    prompts = draw_documents(model, (5, 1, 17), 5)
    free = generate(model, prompts, 10)
    stop = free[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert generate(model, prompts, 10, stop_ids=[stop]) == expected
    assert generate(model, prompts, 10, stop_ids=range(40)) == [row[:1] for row in free]


def test_sampling_is_deterministic_by_seed() -> None:
    """The same seed draws the same tokens, another seed others; top_p near zero is greedy."""
    model = _model("mixed")
    prompts = draw_documents(model, (6, 3), 6)
    first = generate(model, prompts, 12, temperature=1.0, seed=1)
    assert first == generate(model, prompts, 12, temperature=1.0, seed=1)
    assert first != generate(model, prompts, 12, temperature=1.0, seed=2)
    assert generate(model, prompts, 12, temperature=1.0, top_p=1e-9) == generate(model, prompts, 12)
    assert generate(model, prompts, 12, temperature=1e-6, seed=3) == generate(model, prompts, 12)


def test_nucleus_holds_exactly_the_likeliest_tokens() -> None:
    """Probabilities .5, .3, .15, .05: top_p .6 keeps two, in proportion 5 to 3; 1.0 keeps all."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(20000, 1)
    drawn = sample(logits, 1.0, 0.6, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20000
    # five standard deviations of a share of 20,000 draws are 0.018
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0.0, 0.0]), rtol=0, atol=0.018)
    share = torch.bincount(sample(logits, 1.0, 1.0, torch.Generator().manual_seed(0)), minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.018)
    hot = torch.bincount(sample(logits, 2.0, 1.0, torch.Generator().manual_seed(0)), minlength=4) / 20000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    torch.testing.assert_close(hot, expected / expected.sum(), rtol=0, atol=0.018)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompts: list[list[int]]) -> None:
    """One clear message, not an index error."""
    with pytest.raises(DataError, match="empty"):
        generate(_model("sliding"), prompts, 4)


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, -0.5), (1.0, 1.5)])
def test_settings_out_of_range_are_refused(temperature: float, top_p: float) -> None:
    """Not sampled from an empty set of tokens, and not silently taken as greedy."""
    with pytest.raises(ConfigError, match="top_p"):
        generate(_model("sliding"), [[1]], 4, temperature=temperature, top_p=top_p)


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    """The message names the id and the vocabulary's size."""
    with pytest.raises(DataError, match=f"{token}.*40"):
        generate(_model("sliding"), [[1, token]], 4)
