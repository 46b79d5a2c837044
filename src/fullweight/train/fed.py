"""What a step was fed, said the same way on any number of ranks: one digest over all rows in their global order.

The loader takes each row's digest beside training. Ranks put the digests of their rows in the rows' places of one
vector, which is added up with the step's other numbers, so that it costs no exchange of its own: eight 32-bit
words a row, exact as float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fullweight.core.types import Batch
from fullweight.parallel.mesh import Ranks

_WORDS = 8


@dataclass(frozen=True)
class Fed:
    """One step's batch: rows of all ranks, samples in them, and the digest that stands for their content."""

    digest: str
    rows: int
    samples: int


def shares(batches: Sequence[Batch], ranks: Ranks) -> Tensor:
    """This rank's part of the vector that ranks add up: [1 + 8 * rows of all ranks] float64.

    Micro-batch m of data rank r is row m * data_size + r of the step, as the loader deals them out.
    """
    vector = np.zeros((len(batches) * ranks.data_size, _WORDS))
    for micro, batch in enumerate(batches):
        assert batch.digest is not None, "rows of training come from a loader, which takes their digests"
        vector[micro * ranks.data_size + ranks.data_rank] = np.frombuffer(bytes.fromhex(batch.digest), ">u4")
    samples = float(sum(len(batch.sample_ids) for batch in batches))
    return torch.from_numpy(np.concatenate(([samples], vector.reshape(-1)))) * float(ranks.counts_row)


def combined(added: Tensor) -> Fed:
    """The step's batch, from what `shares` of all ranks add up to."""
    samples, words = int(added[0]), added[1:].numpy().astype(">u4")
    return Fed(hashlib.sha256(words.tobytes()).hexdigest(), len(words) // _WORDS, samples)
