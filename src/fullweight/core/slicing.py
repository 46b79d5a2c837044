"""A packed row cut into equal, contiguous slices of tokens.

Several ranks may share a row: each runs the model on its own tokens and asks its neighbours for what reaches
across the cut. Everything here is made from the whole row's layout, so a document is treated as if the row had
not been cut. A compressed entry belongs to the slice that holds its window's last token; each slice has room
for the most that can be (windows do not overlap), and `entry_order` puts the entries of all slices, laid end
to end, back into the row's order. Shapes depend on the row's length alone, never on its documents.

Source: DeepSeek-V4 report, section 5.2 (context parallelism for compressed attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullweight.core.types import Batch, CompressionTable, PackedLayout, Span


@dataclass(frozen=True)
class Slice:
    """Slice `index` of `count` equal slices of a row."""

    index: int
    count: int

    def bounds(self, num_tokens: int) -> tuple[int, int]:
        """First token of the slice and the one after its last, in a row of `num_tokens`."""
        assert num_tokens % self.count == 0, (num_tokens, self.count)
        size = num_tokens // self.count
        return self.index * size, (self.index + 1) * size


WHOLE = Slice(0, 1)


def slice_layout(layout: PackedLayout, part: Slice) -> PackedLayout:
    """The layout of one slice of a whole row: [s] tensors for its s tokens, [E] entries of the row.

    `document_starts` count from the slice's first token and are negative where a document began before it;
    `document_lengths` are those of the pieces in the slice. In its tables, `entry_tokens` and
    `entry_positions` [P] are of the slice's own entries and count from the slice's first token likewise;
    what a token sees stays in the row's numbering.
    """
    if part.count == 1:
        return layout
    first, stop = part.bounds(layout.num_tokens)
    used = layout.num_tokens - layout.num_padding
    pieces, start = [], 0
    for length in layout.document_lengths:
        pieces.append(min(start + length, stop) - max(start, first))
        start += length
    return PackedLayout(
        tuple(n for n in pieces if n > 0),
        stop - max(min(stop, used), first),
        layout.positions[first:stop],
        layout.document_starts[first:stop] - first,
        {ratio: _slice_table(table, layout.num_tokens, part) for ratio, table in layout.tables.items()},
    )


def _slice_table(table: CompressionTable, num_tokens: int, part: Slice) -> CompressionTable:
    first, stop = part.bounds(num_tokens)
    size, device = stop - first, table.entry_tokens.device
    assert size >= table.ratio, "a window may reach one slice back, no further"
    entry = torch.arange(table.entry_tokens.shape[0], device=device)
    # unused entries come last; a last token beyond the row keeps them out of every slice
    used = entry < table.entry_end[-1]
    last_token = torch.where(used, table.entry_tokens + table.ratio - 1, num_tokens)
    begins = torch.searchsorted(last_token, torch.arange(part.count + 1, device=device) * size)
    room = -(-size // table.ratio)
    owner = last_token.clamp(max=num_tokens - 1) // size
    order = torch.where(used, owner * room + entry - begins[owner], 0)
    own = begins[part.index] + torch.arange(room, device=device)
    held = own < begins[part.index + 1]
    own = own.clamp(max=len(entry) - 1)
    return CompressionTable(
        table.ratio,
        torch.where(held, table.entry_tokens[own] - first, 0),
        torch.where(held, table.entry_positions[own], 0),
        table.entry_begin[first:stop],
        table.entry_end[first:stop],
        order,
        tuple(_cut(span, first, stop) for span in table.spans if _length_in(span, first, stop) > 0),
    )


def _length_in(span: Span, first: int, stop: int) -> int:
    return min(span.first_token + span.num_tokens, stop) - max(span.first_token, first)


def _cut(span: Span, first: int, stop: int) -> Span:
    """What lies in the slice, its tokens counted from the slice's first."""
    start = max(span.first_token, first)
    position = span.first_position + start - span.first_token
    return Span(start - first, _length_in(span, first, stop), position, span.first_entry)


def slice_targets(batch: Batch, part: Slice, ahead: int = 1) -> tuple[Tensor, Tensor]:
    """(tokens [s], weights [s]) that the slice's positions predict `ahead` tokens on; see `Batch.targets`."""
    first, stop = part.bounds(batch.num_tokens)
    targets, weights = batch.targets(ahead)
    return targets[first:stop], weights[first:stop]
