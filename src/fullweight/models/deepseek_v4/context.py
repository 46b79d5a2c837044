"""What every layer of one forward pass shares: the layout, the rotary tables, the masks.

Built once per forward by the model; layers only read it. `aux` collects what the layers report beside their
output: sums of the indexer's and the balance loss, and how many tokens each expert got.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fullweight.core.types import PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.rotary import Rotation, frequencies, rotation

if TYPE_CHECKING:
    from fullweight.models.deepseek_v4.cache import LayerCache


class Auxiliary:
    """What the layers of one forward pass report: fp32 loss sums, and int64 expert counts [experts] by layer.

    No dataclass: sharding wrappers rebuild dataclasses among a block's arguments, and a rebuilt one would not
    be the one that the model reads in the end.
    """

    def __init__(self) -> None:
        self.indexer: list[Tensor] = []
        self.balance: list[Tensor] = []
        self.expert_counts: list[Tensor] = []

    def sums(self, device: torch.device) -> dict[str, Tensor]:
        """Each loss over the layers so far; zero where no layer has it."""
        zero = torch.zeros((), device=device)
        return {"indexer": sum(self.indexer, start=zero), "balance": sum(self.balance, start=zero)}


@dataclass(frozen=True)
class Context:
    """Shared inputs of a packed forward pass over T tokens."""

    tokens: Tensor  # [T] int64
    layout: PackedLayout
    documents: Tensor  # [T] int64 index of the token's document
    valid: Tensor  # [T] bool, False on padding
    main: Rotation  # sliding layers
    compress: Rotation  # compressed layers
    entries: dict[int, Rotation]  # by ratio, at the entries' positions
    aux: Auxiliary
    with_losses: bool
    dense_csa: bool = False  # CSA reads every visible entry, not the indexer's choice
    capture: list[LayerCache] | None = None  # one per layer, filled during a prefill

    @staticmethod
    def build(
        config: DeepSeekV4Config,
        tokens: Tensor,
        layout: PackedLayout,
        with_losses: bool,
        capture: list[LayerCache] | None = None,
        *,
        dense_csa: bool = False,
    ) -> Context:
        device = tokens.device
        main = frequencies(config, compressed=False, device=device)
        compress = frequencies(config, compressed=True, device=device)
        total = layout.num_tokens
        return Context(
            tokens=tokens,
            layout=layout,
            documents=torch.cumsum(layout.positions == 0, 0) - 1,
            valid=torch.arange(total, device=device) < total - layout.num_padding,
            main=rotation(layout.positions, main),
            compress=rotation(layout.positions, compress),
            entries={r: rotation(t.entry_positions, compress) for r, t in layout.tables.items()},
            aux=Auxiliary(),
            with_losses=with_losses,
            dense_csa=dense_csa,
            capture=capture,
        )
