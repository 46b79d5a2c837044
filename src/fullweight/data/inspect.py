"""What a data set looks like to the trainer: a report object, before anything is trained.

Everything here is what training would use (the same preparation, encoding and plan of epoch 0), so that a
wrong column, a mask on the wrong tokens or a wasteful row size shows before it costs anything.

Left out: the look of it on a terminal, which is the command's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullweight.data.loader import epoch_plan
from fullweight.data.packing import Plan, plan_rows
from fullweight.data.tokenised import DataConfig, SourceCounts, TokenStore, prepare
from fullweight.data.tokenizer import Tokenizer

_BINS = 12


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of a sample with the same loss mask, decoded together."""

    text: str
    num_tokens: int
    trained: bool


@dataclass(frozen=True)
class ShownSample:
    """A sample as the model sees it."""

    id: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class PackingReport:
    """Packing of one pass: `efficiency` is real tokens / (rows * row_tokens)."""

    samples: int
    tokens: int
    rows: int
    row_tokens: int
    efficiency: float
    max_documents_per_row: int


@dataclass(frozen=True)
class Report:
    """`tokens_per_second` is of encoding on one core, None where the token cache was used.

    `length_edges` [bins + 1] and `length_counts` [bins] are a histogram of the training samples' tokens, each
    bin closed below and open above.
    """

    tokenizer: str
    sources: tuple[SourceCounts, ...]
    length_edges: tuple[int, ...]
    length_counts: tuple[int, ...]
    train: PackingReport
    held_out: PackingReport | None
    tokens_per_second: float | None
    prepare_seconds: float
    samples: tuple[ShownSample, ...]


def inspect(config: DataConfig, tokenizer: Tokenizer, num_samples: int = 2) -> Report:
    """Prepare the data of `config` as training would and report on it; shows the first `num_samples`.

    Raises DataError as `prepare` does.
    """
    begin = time.perf_counter()
    prepared = prepare(config, tokenizer)
    prepare_seconds = time.perf_counter() - begin
    stores = (prepared.train, prepared.held_out)
    seconds, tokens = prepared.encode_seconds, sum(len(s.tokens) for s in stores)
    edges, counts = histogram(prepared.train.lengths)
    held_out = None
    if len(prepared.held_out.ids):
        held_out = _packing(prepared.held_out, plan_rows(prepared.held_out.lengths, config.row_tokens), config)
    return Report(
        tokenizer=config.tokenizer,
        sources=prepared.counts,
        length_edges=edges,
        length_counts=counts,
        train=_packing(prepared.train, epoch_plan(prepared, config, epoch=0), config),
        held_out=held_out,
        tokens_per_second=None if seconds is None else tokens / seconds,
        prepare_seconds=prepare_seconds,
        samples=tuple(
            shown_sample(prepared.train, i, tokenizer) for i in islice(range(len(prepared.train.ids)), num_samples)
        ),
    )


def histogram(lengths: NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(edges, counts) of at most 12 bins of equal whole width that cover all lengths.

    >>> histogram(np.array([1, 2, 3, 3]))
    ((1, 2, 3, 4), (1, 1, 2))
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _BINS)
    edges = np.arange(low, high + width + 1, width)
    counts = np.bincount((lengths - low) // width, minlength=len(edges) - 1)
    return tuple(edges.tolist()), tuple(counts.tolist())


def shown_sample(store: TokenStore, index: int, tokenizer: Tokenizer) -> ShownSample:
    """A stored sample decoded in runs of equal loss mask, special tokens included."""
    span = slice(int(store.offsets[index]), int(store.offsets[index + 1]))
    pairs = zip(store.tokens[span].tolist(), store.loss_mask[span].tolist(), strict=True)
    runs = []
    for trained, group in groupby(pairs, key=lambda pair: bool(pair[1])):
        ids = [token for token, _ in group]
        runs.append(Run(tokenizer.decode(ids), len(ids), trained))
    return ShownSample(store.ids[index], tuple(runs))


def _packing(store: TokenStore, plan: Plan, config: DataConfig) -> PackingReport:
    tokens = int(store.lengths[plan.samples].sum())
    return PackingReport(
        samples=len(plan.samples),
        tokens=tokens,
        rows=plan.num_rows,
        row_tokens=config.row_tokens,
        efficiency=tokens / (plan.num_rows * config.row_tokens),
        max_documents_per_row=int(np.diff(plan.offsets).max()),
    )
