"""The indexer's choice by torch_npu's lightning indexer.

The operator masks causally by token: in a run of S1 queries over S2 keys, query j sees the first S2 - S1 + j + 1.
A token of ours sees one entry for every `ratio` tokens of its document. So a document is taken as `ratio` runs,
each of every `ratio`-th token: along a run a token sees exactly one entry more than the one before it, which is
that mask.

Tokens that see no more entries than are chosen have them all, and need no operator. The runs are of the others, so
that every list is full and what stands in unused places does not matter. The operator wants the head weights in
the queries' type: of entries whose scores differ by less than that rounding, another may be chosen.

Sources: page npu_lightning_indexer; aclnnLightningIndexer and its golden reference in CANN's ops-transformer
(attention/lightning_indexer), by which an index counts from its run's first key, and the lower index is taken of
equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fullweight.core.types import CompressionTable

MOST_HEADS, WIDTH = 64, 128


def takes_count(topk: int) -> bool:
    """Whether the operator chooses that many: up to 2048, or a multiple of 1024 up to 8192."""
    return 1 <= topk <= 2048 or (topk <= 8192 and topk % 1024 == 0)


@dataclass(frozen=True)
class Runs:
    """The tokens that have to choose, run by run, and each run's entries; on the row's device."""

    tokens: Tensor  # [q] int64
    entries: Tensor  # [k] int64
    token_ends: Tensor  # [runs] int32, cumulative
    entry_ends: Tensor  # [runs] int32, cumulative
    place: Tensor  # [T] int64: where in `tokens` a token stands; 0 for those that do not choose

    @classmethod
    def of(cls, table: CompressionTable, topk: int, device: torch.device) -> Self | None:
        """None when no token sees more than `topk` entries. From the host's data alone: nothing is waited for."""
        tokens: list[Tensor] = []
        entries: list[Tensor] = []
        token_ends, entry_ends = [0], [0]
        for span in table.spans:
            for offset in range(min(table.ratio, span.num_tokens)):
                count = -(-(span.num_tokens - offset) // table.ratio)
                seen = (span.first_position + offset + 1) // table.ratio  # by the first, one more by each next
                skipped = max(topk + 1 - seen, 0)
                if skipped >= count:
                    continue
                first = span.first_token + offset + skipped * table.ratio
                tokens.append(torch.arange(first, span.first_token + span.num_tokens, table.ratio))
                entries.append(torch.arange(span.first_entry, span.first_entry + seen + count - 1))
                token_ends.append(token_ends[-1] + count - skipped)
                entry_ends.append(entry_ends[-1] + seen + count - 1)
        if not tokens:
            return None
        chosen = torch.cat(tokens)
        place = torch.zeros(table.entry_begin.shape[0], dtype=torch.int64)
        place[chosen] = torch.arange(chosen.shape[0])
        ends = [torch.tensor(e[1:], dtype=torch.int32).to(device) for e in (token_ends, entry_ends)]
        return cls(chosen.to(device), torch.cat(entries).to(device), ends[0], ends[1], place.to(device))


@torch.no_grad()
def select_entries(
    queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int, runs: Runs | None
) -> Tensor:
    """As the reference's, for the runs of `table` and `topk`."""
    begin, end = table.entry_begin.unsqueeze(1), table.entry_end.unsqueeze(1)
    entry = begin + torch.arange(min(topk, keys.shape[0]), device=keys.device)
    every = torch.where(entry < end, entry, -1)
    if runs is None:
        return every
    found, _ = torch.ops.npu.npu_lightning_indexer(
        queries[runs.tokens],
        keys[runs.entries].unsqueeze(1),
        weights[runs.tokens].to(queries.dtype),
        actual_seq_lengths_query=runs.token_ends,
        actual_seq_lengths_key=runs.entry_ends,
        layout_query="TND",
        layout_key="TND",
        sparse_count=topk,
        sparse_mode=3,
    )
    chosen = (found.squeeze(1).long() + begin[runs.tokens]).sort(-1).values
    return torch.where(end - begin > topk, chosen[runs.place], every)
