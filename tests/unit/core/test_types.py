"""PackedLayout and Batch against their definition, one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.core.errors import DataError
from fullweight.core.types import Batch, PackedLayout

RAGGED = [1, 3, 4, 5, 127, 128, 129, 2, 257, 400]

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def _documents(layout: PackedLayout) -> list[list[int]]:
    """Flat indices of each document, the padding last."""
    documents, start = [], 0
    for length in layout.document_lengths:
        documents.append(list(range(start, start + length)))
        start += length
    return documents


def _check_layout(lengths: list[int], padding: int, ratios: tuple[int, ...]) -> None:
    total = sum(lengths) + padding
    layout = PackedLayout.build(lengths, ratios, total)
    assert layout.num_tokens == total
    assert layout.num_documents == len(lengths)
    assert layout.num_padding == padding
    documents = _documents(layout)
    assert documents[-1][-1] == total - 1
    for document in documents:
        for position, t in enumerate(document):
            assert layout.positions[t] == position
            assert layout.document_starts[t] == document[0]
    assert set(layout.tables) == set(ratios)
    for ratio, table in layout.tables.items():
        assert table.ratio == ratio
        assert len(table.entry_tokens) == len(table.entry_positions) == total // ratio
        used = 0
        for document in documents:
            # whole windows of this document only, in order, each visible from its last token on
            windows = [document[i : i + ratio] for i in range(0, len(document) - ratio + 1, ratio)]
            for w, window in enumerate(windows):
                assert table.entry_tokens[used + w] == window[0]
                assert table.entry_positions[used + w] == document.index(window[0])
            for t in document:
                seen = [used + w for w, window in enumerate(windows) if window[-1] <= t]
                assert list(range(int(table.entry_begin[t]), int(table.entry_end[t]))) == seen
            used += len(windows)
        everywhere = torch.stack([table.entry_begin, table.entry_end])
        assert int(everywhere.max()) <= used  # unused entries are visible to no token
    for tensor in (layout.positions, layout.document_starts):
        assert tensor.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, padding=st.integers(0, 9), ratio=st.sampled_from([1, 3, 4, 8]))
def test_layout_is_its_definition(lengths: list[int], padding: int, ratio: int) -> None:
    """Positions, starts, windows and visibility of random packs equal a literal reading of the rules."""
    _check_layout(lengths, padding, (ratio,))


def test_layout_with_the_models_ratios() -> None:
    """CSA's 4 and HCA's 128 on the lengths around their window ends, with and without padding."""
    for padding in (0, 1, 200):
        _check_layout(RAGGED, padding, (4, 128))


def test_ratio_zero_and_repeats_make_no_table() -> None:
    """A config's compress_ratios can be passed as they are: 0 is sliding-only, repeats are one table."""
    assert set(PackedLayout.build([9], (0, 4, 128, 4, 0)).tables) == {4, 128}
    assert len(PackedLayout.build([127], (128,)).tables[128].entry_tokens) == 0


def test_bad_layouts_are_refused() -> None:
    """Empty rows, empty documents and rows that overflow say what was found."""
    for lengths in ([], [0], [4, 0], [3, -1]):
        with pytest.raises(DataError, match="at least one token"):
            PackedLayout.build(lengths)
    with pytest.raises(DataError, match="documents of 9 tokens do not fit a row of 8"):
        PackedLayout.build([4, 5], (4,), 8)


def _batch(lengths: list[int], num_tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (num_tokens,), generator=generator)
    mask = torch.randint(0, 2, (num_tokens,), generator=generator).float()
    layout = PackedLayout.build(lengths, (4,), num_tokens)
    mask[sum(lengths) :] = 0
    return Batch(tokens, mask, layout)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, padding=st.integers(0, 5), ahead=st.integers(1, 6))
def test_targets_stay_in_their_document(lengths: list[int], padding: int, ahead: int) -> None:
    """Position t predicts the token `ahead` on with that token's weight, or nothing past its document."""
    batch = _batch(lengths, sum(lengths) + padding)
    targets, weights = batch.targets(ahead)
    assert (targets.dtype, weights.dtype) == (torch.int64, torch.float32)
    for document in _documents(batch.layout):
        for t in document:
            inside = t + ahead in document
            assert targets[t] == (batch.tokens[t + ahead] if inside else 0)
            assert weights[t] == (batch.loss_mask[t + ahead] if inside else 0)


def test_targets_beyond_the_row_are_all_empty() -> None:
    """A row no longer than the distance has nothing to predict."""
    batch = _batch([3], 3)
    for ahead in (3, 4):
        targets, weights = batch.targets(ahead)
        assert not targets.any()
        assert not weights.any()


def test_moving_keeps_the_contents() -> None:
    """`to` moves every tensor, tables too, and leaves host data as it is."""
    batch = _batch([5, 4], 12)
    moved = batch.to("meta")
    table, original = moved.layout.tables[4], batch.layout.tables[4]
    for name in ("entry_tokens", "entry_positions", "entry_begin", "entry_end"):
        assert getattr(table, name).is_meta
        assert getattr(table, name).shape == getattr(original, name).shape
    assert moved.tokens.is_meta
    assert moved.loss_mask.is_meta
    assert moved.layout.positions.is_meta
    assert moved.layout.document_starts.is_meta
    assert moved.layout.document_lengths == (5, 4, 3)
    assert moved.layout.num_padding == 3
    assert batch.num_tokens == moved.num_tokens == 12
