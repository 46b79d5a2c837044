"""What a step was fed has one digest, whatever ranks and layouts dealt its rows out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from fullweight.core.types import Batch, PackedLayout
from fullweight.data.loader import batch_digest
from fullweight.parallel.config import Layout
from fullweight.parallel.mesh import Ranks
from fullweight.train import fed


def row(number: int) -> Batch:
    """One of different rows: number + 1 documents of four tokens each."""
    lengths = [4] * (number + 1)
    tokens = torch.arange(sum(lengths)) + number
    batch = Batch(
        tokens, torch.ones(len(tokens)), PackedLayout.build(lengths, (), len(tokens)), ("x",) * (number + 1)
    )
    return replace(batch, digest=batch_digest(batch))


@pytest.mark.parametrize(
    "layout", [Layout(shard=2), Layout(shard=4), Layout(shard=2, context=2), Layout(pipeline=2)]
)
def test_ranks_add_up_to_the_digest_of_one(layout: Layout) -> None:
    """Data ranks take turns, row by row; ranks that share a row count it once."""
    rows = [row(number) for number in range(4)]
    added = sum(
        fed.shares(
            rows[layout.data_rank(rank) :: layout.data_size],
            Ranks(rank, layout.world, torch.device("cpu"), layout),
        )
        for rank in range(layout.world)
    )
    assert isinstance(added, torch.Tensor)
    together = b"".join(bytes.fromhex(batch_digest(r)) for r in rows)
    assert fed.combined(added) == fed.Fed(hashlib.sha256(together).hexdigest(), 4, 1 + 2 + 3 + 4)


def test_another_order_is_another_digest() -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    rows = [row(0), row(1)]
    assert fed.combined(fed.shares(rows, alone)) != fed.combined(fed.shares(rows[::-1], alone))
