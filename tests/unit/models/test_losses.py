"""What transformers lacks: MTP, indexer and balance losses, the bias rule, the mask; and that all trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullweight.core.types import PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4, IndexerLoss
from fullweight.models.deepseek_v4.moe import balance_loss, update_bias
from fullweight.ops import available_operations

from .cases import draw_documents, make_batch, randomise
from .reference import DenseModel, Sums

LENGTHS = (1, 2, 3, 4, 5, 131)


def _config(**changes: object) -> DeepSeekV4Config:
    values: dict[str, object] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "index_n_heads": 32,
        "index_topk": 4,
        "compress_ratios": [4, 0, 128, 4, 0],
    }
    return DeepSeekV4Config.preset("tiny", **(values | changes))


def _model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> DeepSeekV4:
    model = DeepSeekV4(_config(), dtype, **options)  # type: ignore[arg-type]
    randomise(model, seed)
    return model


def _dense_sums(
    model: DeepSeekV4, documents: list[list[int]], masks: list[list[float]], scope: str
) -> tuple[Sums, dict[str, Tensor]]:
    weights = {
        n: t.detach().double().requires_grad_() if t.is_floating_point() else t
        for n, t in model.state_dict().items()
    }
    dense, sums = DenseModel(model.config, weights, scope), Sums()
    for document, mask in zip(documents, masks, strict=True):
        dense.run(document, sums, mask)
    return sums, weights


@pytest.mark.parametrize("ops", available_operations())
@pytest.mark.parametrize("lengths", [(32,), (4,), (20, 12)], ids=str)
def test_square_rows_are_no_special_case(ops: str, lengths: tuple[int, ...]) -> None:
    """As many tokens as channels (32) or streams (4): a tensor and its transpose then have one shape."""
    model = _model(ops=ops)
    documents = draw_documents(model, lengths, 8)
    sums, weights = _dense_sums(model, documents, [[1.0] * n for n in lengths], "selected")
    sum((sums.total(k) for k in ("lm", "mtp", "indexer", "balance")), torch.zeros(())).backward()
    sum(model(make_batch(documents, model.config)).losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if expected is None:  # a row too short for a 128-token window
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert float((parameter.grad - expected).norm()) <= 2e-4 * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize("ops", available_operations())
@pytest.mark.parametrize("scope", ["selected", "visible"])
def test_losses_and_gradients_equal_the_formulas(ops: str, scope: IndexerLoss) -> None:
    """All four losses and the gradient of every parameter equal dense formulas in float64.

    The pack has documents too short for a target, a partial loss mask and padding. fp32 rounding is about
    1e-6 of a loss and 1e-5 of a gradient.
    """
    model = _model(indexer_loss=scope, ops=ops)
    documents = draw_documents(model, LENGTHS, 1)
    generator = torch.Generator().manual_seed(2)
    masks = [(torch.rand(n, generator=generator) < 0.7).float().tolist() for n in LENGTHS]
    coefficients = {"lm": 1.0, "mtp": 0.3, "indexer": 0.7, "balance": 0.9}
    sums, weights = _dense_sums(model, documents, masks, scope)
    sum((c * sums.total(k) for k, c in coefficients.items()), torch.zeros(())).backward()
    output = model(make_batch(documents, model.config, 160, masks))
    sum((c * output.losses[k] for k, c in coefficients.items()), torch.zeros(())).backward()
    assert set(output.losses) == set(coefficients)
    for name in coefficients:
        expected = float(sums.total(name).detach())
        assert float(output.losses[name].detach()) == pytest.approx(expected, rel=2e-5), name
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        error = float((parameter.grad - expected).norm() / expected.norm())
        assert error <= 2e-4, (name, error)


@pytest.mark.parametrize("scope", ["selected", "visible"])
def test_float64_equals_the_formulas_closely(scope: IndexerLoss) -> None:
    """In float64 only the fp32 rotary tables round: what is left is 1e-6, so no term is missing."""
    model = _model(indexer_loss=scope, ops="reference")
    documents = draw_documents(model, LENGTHS, 3)
    model = model.double()
    wide = DeepSeekV4(model.config, torch.float64, indexer_loss=scope, ops="reference").double()
    wide.load_state_dict(model.state_dict())
    sums, weights = _dense_sums(wide, documents, [[1.0] * n for n in LENGTHS], scope)
    sum((sums.total(k) for k in ("lm", "mtp", "indexer", "balance")), torch.zeros(())).backward()
    output = wide(make_batch(documents, wide.config))
    sum(output.losses.values(), torch.zeros(())).backward()
    for name, value in output.losses.items():
        assert float(value.detach()) == pytest.approx(float(sums.total(name).detach()), rel=1e-7), name
    for name, parameter in wide.named_parameters():
        expected = weights[name].grad
        assert float((parameter.grad - expected).norm() / expected.norm()) <= 2e-6, name


@pytest.mark.parametrize("scope", ["selected", "visible", "none"])
def test_indexer_learns_from_its_own_loss_alone(scope: IndexerLoss) -> None:
    """The indexer's loss reaches no other parameter, and no other loss reaches the indexer."""
    model = _model(indexer_loss=scope)
    batch = make_batch(draw_documents(model, LENGTHS, 4), model.config)
    losses = model(batch).losses
    named = dict(model.named_parameters())
    if scope == "none":
        assert losses["indexer"].item() == 0
        assert not losses["indexer"].requires_grad
    else:
        gradients = torch.autograd.grad(
            losses["indexer"], list(named.values()), retain_graph=True, allow_unused=True
        )
        reached = {n for n, g in zip(named, gradients, strict=True) if g is not None and g.any()}
        assert reached == {n for n in named if ".indexer." in n}
    others = losses["lm"] + losses["mtp"] + losses["balance"]
    gradients = torch.autograd.grad(others, list(named.values()), allow_unused=True)
    reached = {n for n, g in zip(named, gradients, strict=True) if g is not None and g.any()}
    assert reached == {n for n in named if ".indexer." not in n}


@pytest.mark.parametrize("ops", available_operations())
def test_dense_csa_reads_every_visible_entry(ops: str) -> None:
    """The warm-up's dense attention equals the formulas of a model whose indexer selects everything.

    Losses and gradients, as above; without losses (evaluation, generation) the model selects as always.
    """
    model = _model(indexer_loss="visible", ops=ops)
    wide = DeepSeekV4(_config(index_topk=1000), ops="reference")
    wide.load_state_dict(model.state_dict())
    documents = draw_documents(model, LENGTHS, 5)
    sums, weights = _dense_sums(wide, documents, [[1.0] * n for n in LENGTHS], "visible")
    sum((sums.total(k) for k in ("lm", "mtp", "indexer", "balance")), torch.zeros(())).backward()
    batch = make_batch(documents, model.config)
    sparse = model(batch, with_losses=False).losses["lm"].item()
    model.dense_csa = True
    assert model(batch, with_losses=False).losses["lm"].item() == sparse
    output = model(batch)
    assert abs(output.losses["lm"].item() - sparse) > 1e-4 * sparse, "the case must tell the two apart"
    sum(output.losses.values(), torch.zeros(())).backward()
    for name, value in output.losses.items():
        assert float(value.detach()) == pytest.approx(float(sums.total(name).detach()), rel=2e-5), name
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert float((parameter.grad - expected).norm() / expected.norm()) <= 2e-4, name


def _indexer_loss(model: DeepSeekV4, document: list[int]) -> float:
    return model(make_batch([document], model.config)).losses["indexer"].item()


def test_indexer_loss_is_a_divergence() -> None:
    """It is never negative, and zero where every token has a single candidate."""
    model = _model()
    assert _indexer_loss(model, [1, 2, 3, 4, 5, 6, 7]) == pytest.approx(0, abs=1e-6)
    assert _indexer_loss(model, [5] * 60) >= 0
    assert _indexer_loss(model, [1, 2, 3]) == 0


def _balance(rows: list[list[float]], lengths: list[int], num_tokens: int | None = None, k: int = 1) -> float:
    layout = PackedLayout.build(lengths, (), num_tokens)
    tokens = torch.zeros(layout.num_tokens, dtype=torch.int64)
    context = Context.build(_config(), tokens, layout, with_losses=True)
    return float(balance_loss(torch.tensor(rows, dtype=torch.float64), context, k))


def test_balance_loss_of_three_tokens_by_hand() -> None:
    """Tokens prefer experts 0, 1, 0; their shares are (.75, .25), (.25, .75), (.6, .4).

    f = 2 / (1 * 3) * (2, 1) and P = (1.6, 1.4) / 3, so sum f P = (4/3)(1.6/3) + (2/3)(1.4/3) = 9.2 / 9.
    """
    rows = [[3.0, 1.0], [1.0, 3.0], [0.9, 0.6]]
    assert _balance(rows, [3]) == pytest.approx(9.2 / 9, rel=1e-12)
    # padding counts for nothing, and two documents add up
    assert _balance([*rows, [9.0, 1.0]], [3], 4) == pytest.approx(9.2 / 9, rel=1e-12)
    assert _balance([*rows, [3.0, 1.0]], [3, 1]) == pytest.approx(9.2 / 9 + 2 * 0.75, rel=1e-12)
    # all experts equally used and liked: exactly one
    assert _balance([[1.0, 1.0]] * 4, [4], k=2) == pytest.approx(1.0, rel=1e-12)


def test_bias_moves_against_the_load() -> None:
    """b_i += speed * sign(mean - load_i); an expert at the mean stays; hashed layers have none."""
    bias = torch.tensor([0.5, -0.25, 0.0, 0.0])
    update_bias(bias, torch.tensor([10, 0, 4, 2]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([0.499, -0.249, 0.0, 0.001]), rtol=0, atol=1e-7)
    # counts beyond what fp32 holds exactly
    bias = torch.zeros(2)
    update_bias(bias, torch.tensor([2**30 + 1, 2**30 - 1]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([-0.001, 0.001]))
    model = _model()
    before = {n: b.clone() for n, b in model.named_buffers()}
    counts = torch.zeros(5, 8, dtype=torch.int64)
    counts[:, 3] = 80
    model.update_router_bias(counts, 0.01)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            assert torch.equal(buffer, before[name])
        else:
            moved = torch.full((8,), 0.01)
            moved[3] = -0.01
            torch.testing.assert_close(buffer - before[name], moved, rtol=0, atol=1e-6)
    # each block moves by its own row
    counts = torch.eye(5, 8, dtype=torch.int64)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.update_router_bias(counts, 0.01)
    for row, block in enumerate(["layers.1", "layers.2", "layers.3", "mtp.0"], start=1):
        name = f"{block}.ffn.gate.bias"
        assert (model.get_buffer(name) < before[name]).nonzero().flatten().tolist() == [row], name


def test_expert_counts_count_real_tokens() -> None:
    """Row i is main layer i, MTP last; a real token counts once per chosen expert, by the table if hashed."""
    model = _model()
    documents = draw_documents(model, (5, 9), 5)
    counts = model(make_batch(documents, model.config, 32)).expert_counts
    assert counts.shape == (5, 8)
    assert counts.dtype == torch.int64
    assert counts.sum(-1).tolist() == [28] * 4 + [24]  # 14 tokens, 12 with a next one, two experts each
    table = model.layers[0].ffn.gate.get_buffer("tid2eid")
    chosen = table[torch.tensor([t for d in documents for t in d])].flatten()
    assert torch.equal(counts[0], torch.bincount(chosen, minlength=8))


@pytest.mark.parametrize("ops", available_operations())
def test_padding_reaches_nothing(ops: str) -> None:
    """With padding of any content, every loss, gradient and count is that of the row without it."""
    model = _model(ops=ops)
    documents = draw_documents(model, (7, 130), 6)
    plain = make_batch(documents, model.config)
    padded = make_batch(documents, model.config, 192)
    padded.tokens[137:] = torch.arange(55) % 40
    padded.loss_mask[137:] = 0.0
    results = []
    for batch in (plain, padded):
        model.zero_grad()
        output = model(batch)
        sum(output.losses.values(), torch.zeros(())).backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters()}))
    (one, gradients), (two, others) = results
    assert model.loss_counts(plain) == model.loss_counts(padded)
    assert torch.equal(one.expert_counts, two.expert_counts)
    torch.testing.assert_close(two.log_probs[:137], one.log_probs, rtol=0, atol=1e-5)
    for name, value in one.losses.items():
        assert two.losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6, name


def test_loss_counts_by_hand() -> None:
    """lm counts trained targets one ahead, mtp two ahead, inside the document; indexer real tokens."""
    model = _model()
    masks = [[1.0, 1.0, 0.0, 1.0], [1.0], [1.0, 1.0], [1.0, 1.0, 0.5]]
    batch = make_batch([[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]], model.config, 16, masks)
    # one ahead: 1 + 0 + 1 | - | 1 | 1 + .5 ; two ahead: 0 + 1 | - | - | .5
    assert model.loss_counts(batch) == {"lm": 4.5, "mtp": 1.5, "indexer": 10.0, "balance": 4.0}


def test_documents_too_short_to_predict() -> None:
    """A document of one token has no language loss, of two no MTP loss; nothing is NaN."""
    model = _model()
    output = model(make_batch([[3], [4]], model.config))
    assert output.losses["lm"].item() == 0
    output = model(make_batch([[3], [4, 5]], model.config))
    assert output.losses["mtp"].item() == 0
    sum(output.losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_an_untrained_row_gives_no_gradient_to_the_head() -> None:
    """A loss mask of zeros makes lm and mtp exactly zero, not NaN."""
    model = _model()
    losses = model(make_batch([[1, 2, 3, 4]], model.config, 8, [[0.0] * 4])).losses
    assert losses["lm"].item() == 0
    assert losses["mtp"].item() == 0


@pytest.mark.parametrize("fresh", [True, False])
def test_every_parameter_trains(fresh: bool) -> None:
    """One step reaches every parameter but unseen embedding rows and experts that no token chose."""
    config = _config(vocab_size=64)
    model = DeepSeekV4(config)
    if fresh:
        initialise(model, 0)
    else:
        randomise(model, 0)
    tokens = torch.randint(50, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    output = model(make_batch([tokens[:280], tokens[280:]], config))
    sum(output.losses.values(), torch.zeros(())).backward()
    counts = output.expert_counts
    blocks = [f"layers.{i}" for i in range(4)] + ["mtp.0"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name == "embed.weight":
            rows = parameter.grad.flatten(1).any(1).nonzero().flatten().tolist()
            assert rows == sorted(set(tokens)), name
        elif ".experts." in name:
            reached = counts[blocks.index(name.split(".ffn.")[0])] > 0
            assert torch.equal(parameter.grad.flatten(1).any(1), reached), name
        else:
            assert parameter.grad.any(), name


def test_evaluation_has_the_language_loss_only() -> None:
    """Without gradients the auxiliary losses are left out unless asked for; log_probs sum to the loss."""
    model = _model()
    batch = make_batch(draw_documents(model, (9, 20), 7), model.config, 40)
    with torch.no_grad():
        output = model(batch)
        asked = model(batch, with_losses=True)
    assert set(output.losses) == {"lm"}
    assert set(asked.losses) == {"lm", "mtp", "indexer", "balance"}
    weights = batch.targets()[1]
    assert float(-(output.log_probs * weights).sum()) == pytest.approx(output.losses["lm"].item(), rel=1e-5)
    assert output.losses["lm"].item() < math.inf
