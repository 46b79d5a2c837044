"""What every layer of one forward pass shares: the layout, the rotary tables, the masks.

Built once per forward by the model; layers only read it. `aux` collects what the layers report beside their
output: sums of the indexer's and the balance loss, how many tokens each expert got, and how many choices were
dropped. Everything is made from
the whole row and then cut to the tokens at hand (`tokens.py`), so documents that go on elsewhere stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fullweight.core.slicing import slice_layout
from fullweight.core.types import PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.rotary import Rotation, frequencies, rotation
from fullweight.models.deepseek_v4.tokens import WHOLE_ROW, TokenAxis

if TYPE_CHECKING:
    from fullweight.models.deepseek_v4.cache import LayerCache


class Auxiliary:
    """What the layers of one forward pass report.

    fp32 loss sums, and by layer int64 numbers of tokens of each expert [experts] and of dropped choices [].

    No dataclass: sharding wrappers rebuild dataclasses among a block's arguments, and a rebuilt one would not
    be the one that the model reads in the end.
    """

    def __init__(self) -> None:
        self.indexer: list[Tensor] = []
        self.balance: list[Tensor] = []
        self.expert_counts: list[Tensor] = []
        self.dropped: list[Tensor] = []

    def sums(self, device: torch.device) -> dict[str, Tensor]:
        """Each loss over the layers so far; zero where no layer has it."""
        zero = torch.zeros((), device=device)
        return {"indexer": sum(self.indexer, start=zero), "balance": sum(self.balance, start=zero)}

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Forget what is reported inside: a forward pass that is made again reported the first time."""
        reports = (self.indexer, self.balance, self.expert_counts, self.dropped)
        before = [len(report) for report in reports]
        try:
            yield
        finally:
            for report, length in zip(reports, before, strict=True):
                del report[length:]


@dataclass(frozen=True)
class Span:
    """What attention reads of the tokens whose queries it runs."""

    layout: PackedLayout
    main: Rotation
    compress: Rotation


@dataclass(frozen=True)
class Context:
    """Shared inputs of a packed forward pass over T tokens: the row, or this holder's slice of it."""

    tokens: Tensor  # [T] int64
    layout: PackedLayout
    documents: Tensor  # [T] int64 index, in the row, of the token's document
    num_documents: int  # of the row, with the padding
    valid: Tensor  # [T] bool, False on padding
    main: Rotation  # sliding layers
    compress: Rotation  # compressed layers
    entries: dict[int, Rotation]  # by ratio, at the positions of the entries made here
    span: Span
    axis: TokenAxis
    aux: Auxiliary
    with_losses: bool
    dense_csa: bool = False  # CSA reads every visible entry, not the indexer's choice
    capture: list[LayerCache] | None = None  # one per layer, filled during a prefill

    @staticmethod
    def build(
        config: DeepSeekV4Config,
        tokens: Tensor,
        row: PackedLayout,
        with_losses: bool,
        capture: list[LayerCache] | None = None,
        *,
        axis: TokenAxis = WHOLE_ROW,
        dense_csa: bool = False,
    ) -> Context:
        """The context of the tokens that `axis` gives, of the whole row's `tokens` and layout."""
        device = tokens.device
        main = frequencies(config, compressed=False, device=device)
        compress = frequencies(config, compressed=True, device=device)
        layout = slice_layout(row, axis.slice)
        here = slice(*axis.slice.bounds(row.num_tokens))
        span = own = Span(layout, rotation(layout.positions, main), rotation(layout.positions, compress))
        if axis.span != axis.slice:
            wide = slice_layout(row, axis.span)
            span = Span(wide, rotation(wide.positions, main), rotation(wide.positions, compress))
        return Context(
            tokens=tokens[here],
            layout=layout,
            documents=(torch.cumsum(row.positions == 0, 0) - 1)[here],
            num_documents=len(row.document_lengths),
            valid=torch.arange(layout.num_tokens, device=device) < layout.num_tokens - layout.num_padding,
            main=own.main,
            compress=own.compress,
            entries={r: rotation(t.entry_positions, compress) for r, t in layout.tables.items()},
            span=span,
            axis=axis,
            aux=Auxiliary(),
            with_losses=with_losses,
            dense_csa=dense_csa,
            capture=capture,
        )
