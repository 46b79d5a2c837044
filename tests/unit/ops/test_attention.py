"""The contracts of compressor, indexer and attention, on a ragged row, against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullweight.core.slicing import Slice, slice_layout
from fullweight.core.types import PackedLayout
from fullweight.ops.reference import Compressed, ReferenceOperations

from . import formulas
from .checks import LAYOUT, NUM_TOKENS, TOLERANCE, angles, check, dtypes, error, random

# ---- compressor and indexer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (128, False)])
def test_compress(ops: ReferenceOperations, ratio: int, overlap: bool) -> None:
    """Windows stay in their document, tails make no entry, a document's first window has no previous one."""
    inputs = [random(NUM_TOKENS, 24), random(NUM_TOKENS, 24, seed=1, scale=3.0), random(ratio, 24, seed=2)]
    count = sum(n // ratio for n in LAYOUT.document_lengths)
    table = LAYOUT.tables[ratio]
    check(
        lambda v, g, a: ops.compress(v, g, a, table, overlap)[:count],
        lambda v, g, a: formulas.compress(v, g, a, LAYOUT, overlap),
        inputs,
        torch.float32,
    )
    assert ops.compress(*inputs, table, overlap).shape == (NUM_TOKENS // ratio, 12 if overlap else 24)


def test_rows_too_short_for_any_entry(ops: ReferenceOperations) -> None:
    """Three tokens: zero entries, nothing selected, no indexer loss, attention over the window alone."""
    layout = PackedLayout.build([3], (4, 128))
    table = layout.tables[4]
    entries = ops.compress(random(3, 16), random(3, 16), random(4, 16), table, True)
    assert entries.shape == (0, 8)
    queries, weights = random(3, 2, 8), random(3, 2)
    selected = ops.select_entries(queries, entries, weights, table, 5)
    assert selected.shape == (3, 0)
    q, kv, sink = random(3, 2, 8), random(3, 8), random(2)
    result = ops.attention(q, kv, sink, layout, 4, angles(3, 2), Compressed(entries, table, selected))
    plain = formulas.attention(q.double(), kv.double(), sink.double(), layout, 4, angles(3, 2))[0]
    assert error(result.out, plain) <= 1e-6
    assert result.mass is not None
    assert ops.indexer_loss(queries, entries, weights, selected, result.mass, 3).item() == 0


@dtypes
@pytest.mark.parametrize("topk", [1, 7, 64, 1000])
def test_select_entries(ops: ReferenceOperations, dtype: torch.dtype, topk: int) -> None:
    """The best visible entries of the document, ascending, -1 last; 1000 is more than there are.

    Values are small integers, so that every score is exact in bf16 too and ties are real ties.
    """
    generator = torch.Generator().manual_seed(topk)
    queries = torch.randint(-2, 3, (NUM_TOKENS, 8, 16), generator=generator).to(dtype)
    keys = torch.randint(-1, 2, (NUM_TOKENS // 4, 16), generator=generator).to(dtype)
    weights = torch.randint(-2, 4, (NUM_TOKENS, 8), generator=generator).float()
    found = ops.select_entries(queries, keys, weights, LAYOUT.tables[4], topk)
    scores = formulas.index_scores(queries.double(), keys.double(), weights.double())
    visible = formulas.visible_entries(LAYOUT, 4)
    assert found.dtype == torch.int64
    assert found.tolist() == formulas.select_entries(scores, visible, topk, min(topk, NUM_TOKENS // 4))


def test_ties_go_to_the_lower_index(ops: ReferenceOperations) -> None:
    """With all scores zero each token takes its document's first entries."""
    zeros = torch.zeros(NUM_TOKENS, 4, 8)
    found = ops.select_entries(zeros, torch.zeros(NUM_TOKENS // 4, 8), zeros[..., 0], LAYOUT.tables[4], 3)
    visible = formulas.visible_entries(LAYOUT, 4)
    assert found.tolist() == [[*v, -1, -1, -1][:3] for v in visible]


TURN = angles(NUM_TOKENS, 4)


# ---- attention ---------------------------------------------------------------------------------------------


def _selection(layout: PackedLayout, k: int, seed: int) -> tuple[Tensor, list[list[int]]]:
    """Random visible entries of each token, as `select_entries` lays them out, and as lists."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for places in formulas.visible_entries(layout, 4):
        order = torch.randperm(len(places), generator=generator).tolist()[:k]
        lists.append(sorted(places[i] for i in order))
    return torch.tensor([row + [-1] * (k - len(row)) for row in lists]), lists


@dtypes
@pytest.mark.parametrize("kind", ["sliding", "csa", "hca"])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_attention(ops: ReferenceOperations, dtype: torch.dtype, kind: str, window: int) -> None:
    """Window, entries and sink in one softmax, in-document; lse and per-entry mass; all gradients."""
    inputs = [
        random(NUM_TOKENS, 3, 16, dtype=dtype),
        random(NUM_TOKENS, 16, dtype=dtype, seed=1),
        random(3, seed=2),
    ]
    table, lists, selected = None, None, None
    if kind == "csa":
        table = LAYOUT.tables[4]
        selected, lists = _selection(LAYOUT, 9, window)
    elif kind == "hca":
        # entries of 4 tokens rather than 128: many to see, the same contract
        table, lists = LAYOUT.tables[4], formulas.visible_entries(LAYOUT, 4)
    if table is not None:
        inputs.append(random(NUM_TOKENS // 4, 16, dtype=dtype, seed=3))

    def operation(q: Tensor, kv: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        compressed = Compressed(entries, table, selected) if entries is not None and table is not None else None
        return ops.attention(q, kv, sink, LAYOUT, window, TURN, compressed).out

    def formula(q: Tensor, kv: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        return formulas.attention(q, kv, sink, LAYOUT, window, TURN, entries, lists)[0]

    check(operation, formula, inputs, dtype)
    compressed = Compressed(inputs[3], table, selected) if table is not None else None
    result = ops.attention(*inputs[:3], LAYOUT, window, TURN, compressed)
    wide = [x.double() for x in inputs]
    _, lse, masses = formulas.attention(*wide[:3], LAYOUT, window, TURN, wide[3] if table else None, lists)
    assert error(result.lse, lse) <= TOLERANCE[dtype][0]
    assert result.lse.dtype == torch.float32
    assert not result.lse.requires_grad
    if selected is None:
        assert result.mass is None
        return
    assert result.mass is not None
    for row, places, mass in zip(result.mass, lists or [], masses, strict=True):
        torch.testing.assert_close(row[: len(places)].double(), mass, rtol=0.03, atol=1e-4)
        assert not row[len(places) :].any()


@dtypes
@pytest.mark.parametrize("kind", ["csa", "hca"])
@pytest.mark.parametrize("window", [1, 32, 50])
def test_attention_of_slices(ops: ReferenceOperations, dtype: torch.dtype, kind: str, window: int) -> None:
    """Keys from before the first query: three slices give the row's outputs and gradients."""
    selected, lists = _selection(LAYOUT, 9, window)
    if kind == "hca":
        selected, lists = None, formulas.visible_entries(LAYOUT, 4)
    size = NUM_TOKENS // 3

    def operation(q: Tensor, kv: Tensor, sink: Tensor, entries: Tensor) -> Tensor:
        outs = []
        for i in range(3):
            a, b = i * size, (i + 1) * size
            layout = slice_layout(LAYOUT, Slice(i, 3))
            keys = kv[max(a - window + 1, 0) : b]
            if i == 0:
                keys = torch.cat((kv.new_full((window - 1, 16), 1e4), keys))  # nobody looks there
            picked = None if selected is None else selected[a:b]
            compressed = Compressed(entries, layout.tables[4], picked)
            turn = TURN[0][a:b], TURN[1][a:b]
            outs.append(ops.attention(q[a:b], keys, sink, layout, window, turn, compressed).out)
        return torch.cat(outs)

    inputs = [
        random(NUM_TOKENS, 3, 16, dtype=dtype),
        random(NUM_TOKENS, 16, dtype=dtype, seed=1),
        random(3, seed=2),
        random(NUM_TOKENS // 4, 16, dtype=dtype, seed=3),
    ]
    check(
        operation,
        lambda q, kv, sink, e: formulas.attention(q, kv, sink, LAYOUT, window, TURN, e, lists)[0],
        inputs,
        dtype,
    )


@dtypes
@pytest.mark.parametrize("sink", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_of_extreme_logits(
    ops: ReferenceOperations, dtype: torch.dtype, sink: float, scale: float
) -> None:
    """Logits of hundreds and sinks that take all or nothing neither overflow nor lose the result."""
    layout = PackedLayout.build([40, 9], (4,))
    q, kv = random(49, 2, 16, dtype=dtype, scale=scale), random(49, 16, dtype=dtype, seed=1, scale=3.0)
    sinks, turn = torch.full((2,), sink), angles(49, 4)
    table, entries = layout.tables[4], random(12, 16, dtype=dtype, seed=2)
    q.requires_grad_()
    out = ops.attention(q, kv, sinks, layout, 8, turn, Compressed(entries, table)).out
    lists = formulas.visible_entries(layout, 4)
    exact = formulas.attention(
        q.detach().double(), kv.double(), sinks.double(), layout, 8, turn, entries.double(), lists
    )[0]
    out.float().sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()
    # logits in bf16 are off by 2^-9 of hundreds, so their softmax is only held to be finite and bounded
    if dtype == torch.float32:
        assert float((out.detach().double() - exact).abs().max()) <= 2e-4
    assert float(out.detach().abs().max()) <= float(torch.cat((kv, entries)).abs().max()) * 1.01


# ---- indexer loss --------------------------------------------------------------------------------------------


@dtypes
def test_indexer_loss(ops: ReferenceOperations, dtype: torch.dtype) -> None:
    """KL over selected entries from a given mass; tokens without entries or mass, and padding, add nothing."""
    tokens = NUM_TOKENS - LAYOUT.num_padding
    selected, lists = _selection(LAYOUT, 9, 5)
    mass = torch.rand(NUM_TOKENS, 9, generator=torch.Generator().manual_seed(1)).masked_fill(selected < 0, 0.0)
    mass[20] = 0.0
    mass[100, 0] = 0.0
    inputs = [
        random(NUM_TOKENS, 6, 16, dtype=dtype),
        random(NUM_TOKENS // 4, 16, dtype=dtype, seed=1),
        random(NUM_TOKENS, 6, seed=2, scale=0.2),
    ]
    masses = [row[: len(places)].double() for row, places in zip(mass, lists, strict=True)]
    check(
        lambda q, k, w: ops.indexer_loss(q, k, w, selected, mass, tokens),
        lambda q, k, w: formulas.kl_sum(masses, formulas.index_scores(q, k, w), lists, tokens),
        inputs,
        dtype,
    )


@dtypes
def test_dense_indexer_loss(ops: ReferenceOperations, dtype: torch.dtype) -> None:
    """KL over every visible entry, the target from q, the entries and the attention's own denominator."""
    tokens = NUM_TOKENS - LAYOUT.num_padding
    lists = formulas.visible_entries(LAYOUT, 4)
    q, entries = random(NUM_TOKENS, 3, 16, dtype=dtype, seed=3), random(NUM_TOKENS // 4, 16, dtype=dtype, seed=4)
    lse = 3 + random(NUM_TOKENS, 3, seed=5)
    inputs = [
        random(NUM_TOKENS, 6, 16, dtype=dtype),
        random(NUM_TOKENS // 4, 16, dtype=dtype, seed=1),
        random(NUM_TOKENS, 6, seed=2, scale=0.2),
    ]
    logits = torch.einsum("thc,sc->ths", q.double(), entries.double()) / 4 - lse.double()[:, :, None]
    masses = [logits[t][:, places].exp().sum(0) for t, places in enumerate(lists)]
    compressed = Compressed(entries, LAYOUT.tables[4])
    check(
        lambda queries, k, w: ops.dense_indexer_loss(queries, k, w, q, lse, compressed, tokens),
        lambda queries, k, w: formulas.kl_sum(masses, formulas.index_scores(queries, k, w), lists, tokens),
        inputs,
        dtype,
    )


def test_indexer_loss_by_hand(ops: ReferenceOperations) -> None:
    """One token, two entries: p = (3/4, 1/4), scores (ln 2, 0) so softmax = (2/3, 1/3).

    KL = 3/4 ln(9/8) + 1/4 ln(3/4).
    """
    queries = torch.tensor([[[1.0, 0.0]]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([[0.693147181]])
    loss = ops.indexer_loss(queries, keys, weights, torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.2]]), 1)
    assert loss.item() == pytest.approx(0.016416739, rel=1e-5)
