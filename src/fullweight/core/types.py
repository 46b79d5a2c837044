"""The tensors that pass between the data loader, the model and the methods.

There is no batch dimension: a micro-batch is one packed row of T tokens holding several documents.
`PackedLayout` says where each document lies and which compressed entries each token may see; it is built
once, on the host, and the model only reads it. Everything in it is in-document: windows never straddle
documents and a tail shorter than the compression ratio makes no entry.

Shape letters: T tokens of the row, E compressed entries of the row (always T // ratio; unused ones are
visible to no token, so that shapes do not depend on the documents).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fullweight.core.errors import DataError


@dataclass(frozen=True)
class Span:
    """A document's tokens that lie together in a row, or in its slice. Host data."""

    first_token: int
    num_tokens: int
    first_position: int  # of its first token in the document
    first_entry: int  # of its document, as `entry_begin`


@dataclass(frozen=True)
class CompressionTable:
    """Where the compressed entries of one ratio come from and who sees them (all int64).

    Entry e of a document covers `ratio` tokens from flat index `entry_tokens[e]`; token t sees the entries
    `entry_begin[t] <= e < entry_end[t]`: those of its own document whose window ended at or before t.
    """

    ratio: int
    entry_tokens: Tensor  # [E] flat index of the first token of the window
    entry_positions: Tensor  # [E] in-document position of that token (its RoPE position)
    entry_begin: Tensor  # [T]
    entry_end: Tensor  # [T]
    entry_order: Tensor | None = None  # of a slice of a row (`core/slicing.py`): [E] into all slices' entries
    spans: tuple[Span, ...] = ()  # who sees what once more, on the host; empty where nobody looks

    def to(self, device: torch.device | str) -> CompressionTable:
        return CompressionTable(
            self.ratio,
            self.entry_tokens.to(device),
            self.entry_positions.to(device),
            self.entry_begin.to(device),
            self.entry_end.to(device),
            None if self.entry_order is None else self.entry_order.to(device),
            self.spans,
        )


@dataclass(frozen=True)
class PackedLayout:
    """Where the documents of one packed row of T tokens lie.

    `document_lengths` is host data and includes, last, the padding (`num_padding` tokens, which form a
    document of their own that no loss reads). Tensors are int64 on the row's device.
    """

    document_lengths: tuple[int, ...]
    num_padding: int
    positions: Tensor  # [T] in-document position
    document_starts: Tensor  # [T] flat index of the first token of the token's document
    tables: dict[int, CompressionTable] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.positions.shape[0]

    @property
    def num_documents(self) -> int:
        """Documents without the padding."""
        return len(self.document_lengths) - (self.num_padding > 0)

    @staticmethod
    def build(
        document_lengths: Sequence[int], ratios: Sequence[int] = (), num_tokens: int | None = None
    ) -> PackedLayout:
        """Layout of documents laid end to end, padded to `num_tokens`.

        Raises DataError on an empty row, an empty document or documents longer than the row.
        """
        lengths = [int(n) for n in document_lengths]
        if not lengths or min(lengths) < 1:
            raise DataError(f"a packed row needs documents of at least one token, found lengths {lengths}")
        used = sum(lengths)
        total = used if num_tokens is None else num_tokens
        if used > total:
            raise DataError(f"documents of {used} tokens do not fit a row of {total}")
        num_padding = total - used
        if num_padding:
            lengths.append(num_padding)
        sizes = torch.tensor(lengths)
        starts = torch.cumsum(sizes, 0) - sizes
        document_starts = torch.repeat_interleave(starts, sizes)
        positions = torch.arange(total) - document_starts
        tables = {r: _compression_table(r, sizes, starts, positions) for r in sorted({r for r in ratios if r > 0})}
        return PackedLayout(tuple(lengths), num_padding, positions, document_starts, tables)

    def to(self, device: torch.device | str) -> PackedLayout:
        return replace(
            self,
            positions=self.positions.to(device),
            document_starts=self.document_starts.to(device),
            tables={r: t.to(device) for r, t in self.tables.items()},
        )


def _compression_table(ratio: int, sizes: Tensor, starts: Tensor, positions: Tensor) -> CompressionTable:
    total = positions.shape[0]
    counts = sizes // ratio
    first = torch.cumsum(counts, 0) - counts
    document = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    within = torch.arange(len(document)) - first[document]
    entry_positions = torch.zeros(total // ratio, dtype=torch.int64)
    entry_tokens = torch.zeros_like(entry_positions)
    entry_positions[: len(within)] = within * ratio
    entry_tokens[: len(within)] = starts[document] + within * ratio
    begin = torch.repeat_interleave(first, sizes)
    end = begin + (positions + 1) // ratio
    spans = tuple(Span(t, n, 0, e) for t, n, e in zip(*(x.tolist() for x in (starts, sizes, first)), strict=True))
    return CompressionTable(ratio, entry_tokens, entry_positions, begin, end, spans=spans)


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch.

    `loss_mask[t]` belongs to token t itself: 1.0 where the model must learn to emit tokens[t]. What is
    predicted from position t is token t+1 of the same document; `targets()` does that shift once.
    """

    tokens: Tensor  # [T] int64
    loss_mask: Tensor  # [T] float32
    layout: PackedLayout
    sample_ids: tuple[str, ...] = ()
    digest: str | None = None  # of its content (`data.loader.batch_digest`), where the loader took it

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            layout=self.layout.to(device),
        )

    def targets(self, ahead: int = 1) -> tuple[Tensor, Tensor]:
        """(tokens [T] int64, weights [T] float32): what position t predicts `ahead` tokens on.

        A position whose target lies outside its document has weight 0 (and target 0).
        """
        targets = torch.zeros_like(self.tokens)
        weights = torch.zeros_like(self.loss_mask)
        if ahead < self.num_tokens:
            positions = self.layout.positions
            inside = positions[ahead:] == positions[:-ahead] + ahead
            targets[:-ahead] = torch.where(inside, self.tokens[ahead:], 0)
            weights[:-ahead] = torch.where(inside, self.loss_mask[ahead:], 0.0)
        return targets, weights
