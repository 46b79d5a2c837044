"""Slices of a packed row against a walk over its tokens, one by one."""

import pytest
import torch

from fullweight.core.slicing import Slice, slice_layout, slice_targets
from fullweight.core.types import Batch, PackedLayout

RAGGED = (1, 3, 4, 5, 127, 128, 129, 300)
PACKS = {
    "ragged": (RAGGED, 768),
    "one document": ((768,), 768),
    "fifty documents": (tuple(1 + (7 * i) % 23 for i in range(50)), 768),
    "padding fills slices": ((130, 20), 768),
    "no whole window": ((3, 2, 1), 768),
}


def windows(lengths: tuple[int, ...], ratio: int) -> list[tuple[int, int]]:
    """(first token in the row, in-document position) of every compressed entry, in order."""
    found, start = [], 0
    for length in lengths:
        found += [(start + p, p) for p in range(0, length - ratio + 1, ratio)]
        start += length
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("pack", PACKS)
def test_entries_of_all_slices_in_order_are_the_rows(pack: str, count: int) -> None:
    """Each slice makes the entries whose windows end in it, in equal room; the order finds every one."""
    lengths, total = PACKS[pack]
    layout = PackedLayout.build(lengths, (4, 128), total)
    slices = [slice_layout(layout, Slice(i, count)) for i in range(count)]
    for ratio in (4, 128):
        expected = windows(layout.document_lengths, ratio)
        size = total // count
        made = []
        for i, part in enumerate(slices):
            table = part.tables[ratio]
            assert len(table.entry_tokens) == len(table.entry_positions) == -(-size // ratio)
            tokens = (table.entry_tokens + i * size).tolist()
            made += list(zip(tokens, table.entry_positions.tolist(), strict=True))
            own = [w for w in expected if i * size <= w[0] + ratio - 1 < (i + 1) * size]
            assert made[-len(table.entry_tokens) :][: len(own)] == own
        order = slices[0].tables[ratio].entry_order
        if count == 1:
            assert order is None
            continue
        assert order is not None
        assert len(order) == total // ratio
        assert [made[at] for at in order.tolist()][: len(expected)] == expected
        assert all(torch.equal(order, s.tables[ratio].entry_order) for s in slices)


@pytest.mark.parametrize("pack", PACKS)
def test_tokens_of_all_slices_are_the_rows(pack: str) -> None:
    """Positions, what each token sees, padding and the pieces of documents; starts count from the slice."""
    lengths, total = PACKS[pack]
    layout = PackedLayout.build(lengths, (4, 128), total)
    slices = [slice_layout(layout, Slice(i, 4)) for i in range(4)]
    size = total // 4
    assert torch.equal(torch.cat([s.positions for s in slices]), layout.positions)
    starts = torch.cat([s.document_starts + i * size for i, s in enumerate(slices)])
    assert torch.equal(starts, layout.document_starts)
    for ratio, table in layout.tables.items():
        for name in ("entry_begin", "entry_end"):
            joined = torch.cat([getattr(s.tables[ratio], name) for s in slices])
            assert torch.equal(joined, getattr(table, name))
    padding = [False] * (total - layout.num_padding) + [True] * layout.num_padding
    for i, part in enumerate(slices):
        assert part.num_padding == sum(padding[i * size : (i + 1) * size])
        assert sum(part.document_lengths) == part.num_tokens == size
        document = [d for d, n in enumerate(layout.document_lengths) for _ in range(n)][i * size : (i + 1) * size]
        assert list(part.document_lengths) == [document.count(d) for d in sorted(set(document))]


def test_targets_reach_over_the_cut() -> None:
    """A slice's last token is to predict the next slice's first one, in the same document."""
    layout = PackedLayout.build((5, 3), (), 8)
    batch = Batch(torch.arange(10, 18), torch.ones(8), layout)
    targets, weights = slice_targets(batch, Slice(0, 2))
    assert targets.tolist() == [11, 12, 13, 14]
    assert weights.tolist() == [1, 1, 1, 1]
    targets, weights = slice_targets(batch, Slice(1, 2))
    assert targets.tolist() == [0, 16, 17, 0]
    assert weights.tolist() == [0, 1, 1, 0]
