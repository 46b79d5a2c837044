"""The endless stream of packed rows that training reads, one row per rank and micro-batch.

Rows of all epochs form one sequence: epoch 0's, epoch 1's, ... Its row g goes to rank g % world_size. So all
ranks have a row at every micro-batch whatever the number of rows in an epoch, no row is dropped or padded
away at an epoch's end, and what is trained on is the same for every number of ranks.

The state is the position in that sequence up to which rows were handed out (by all ranks, which run in step),
never what was made ahead. It therefore restores on any number of ranks.

A single background thread makes rows ahead, in order. An error there is raised by the `next` that would have
returned the row.

Left out: which rows there are (`packing.py`) and how their tokens are kept (`tokenised.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from fullweight.core.errors import DataError
from fullweight.core.types import Batch, PackedLayout
from fullweight.data.packing import Indices, Plan, epoch_samples, plan_epoch, plan_rows
from fullweight.data.tokenised import DataConfig, Prepared, TokenStore, prepare
from fullweight.data.tokenizer import Tokenizer

__all__ = ["DataConfig", "PackedLoader", "batch_digest", "epoch_plan", "make_batch", "prepare"]


@dataclass(frozen=True)
class _Cursor:
    """A position in the sequence of rows: row `row` of epoch `epoch` is the next one."""

    epoch: int
    row: int


class PackedLoader:
    """Iterates over this rank's training rows without end; a context manager, or call `close()`.

    `ratios` are the model's compression ratios (see PackedLayout.build). `prepared` shares one
    `prepare(config, tokenizer)` between loaders. Every batch has `row_tokens` tokens.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        ratios: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
        prepared: Prepared | None = None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.config, self.ratios, self.rank, self.world_size = config, tuple(ratios), rank, world_size
        self.prepared = prepare(config, tokenizer) if prepared is None else prepared
        self._pad_id = tokenizer.pad_id
        self._identity = _identity(config, self.prepared)
        self._cursor = _Cursor(0, 0)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fullweight-data")
        self._pending: deque[Future[tuple[Batch, _Cursor]]] = deque()
        self._rows: Iterator[tuple[Batch, _Cursor]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._rows is None:
            self._rows = _rank_rows(
                self.prepared,
                self.config,
                self._cursor,
                rank=self.rank,
                world_size=self.world_size,
                ratios=self.ratios,
                pad_id=self._pad_id,
            )
        while len(self._pending) < self.config.prefetch:
            self._pending.append(self._executor.submit(next, self._rows))
        try:
            batch, self._cursor = self._pending.popleft().result()
        except BaseException:
            self._discard()
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, for JSON; equal on all ranks that run in step."""
        return {"epoch": self._cursor.epoch, "row": self._cursor.row, "data": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: the next batch is the one that followed it. Raises DataError on other data."""
        if state["data"] != self._identity:
            raise DataError(
                f"the state was saved with other data: found {state['data']}, these are {self._identity}; "
                "resume with the samples, split, encoding, tokenizer, packing and seed of that run"
            )
        self._discard()
        self._cursor = _Cursor(state["epoch"], state["row"])

    def held_out_batches(self) -> list[Batch]:
        """This rank's share of the packed held-out rows, the same at every call; [] without held-out data.

        Row i goes to rank i % world_size. All ranks get the same number of batches: where rows run out, the
        first row is given again with a loss mask of zeros and no sample ids, which no sum can see.
        """
        store = self.prepared.held_out
        plan = plan_rows(store.lengths, self.config.row_tokens)
        batches = []
        for first in range(0, plan.num_rows, self.world_size):
            index = first + self.rank
            row = plan.row(index if index < plan.num_rows else 0)
            batch = make_batch(store, row, self.config.row_tokens, self.ratios, self._pad_id)
            if index >= plan.num_rows:
                batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), sample_ids=())
            batches.append(batch)
        return batches

    def held_out_samples(self) -> list[dict[str, Any]]:
        """The raw held-out samples, all of them on every rank, for scores that generate."""
        return list(self.prepared.held_out_samples)

    def close(self) -> None:
        """Stop the background thread; the loader gives no more batches."""
        self._discard()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _discard(self) -> None:
        """Forget the rows made ahead; the next batch starts again from the cursor."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._rows = None


def epoch_plan(prepared: Prepared, config: DataConfig, epoch: int) -> Plan:
    """The rows of an epoch for all ranks together, in order."""
    store = prepared.train
    groups = [np.flatnonzero(store.source == s) for s in range(len(config.sources))]
    samples = epoch_samples(groups, config.weights(), config.seed, epoch)
    return plan_epoch(
        store.lengths,
        samples,
        row_tokens=config.row_tokens,
        window=config.shuffle_window,
        seed=config.seed,
        epoch=epoch,
    )


def make_batch(store: TokenStore, samples: Indices, row_tokens: int, ratios: Sequence[int], pad_id: int) -> Batch:
    """One packed row of the given samples in order, padded with `pad_id` to `row_tokens`."""
    tokens = np.full(row_tokens, pad_id, dtype=np.int64)
    loss_mask = np.zeros(row_tokens, dtype=np.float32)
    lengths, at = [], 0
    for sample in samples.tolist():
        begin, end = int(store.offsets[sample]), int(store.offsets[sample + 1])
        lengths.append(end - begin)
        tokens[at : at + lengths[-1]] = store.tokens[begin:end]
        loss_mask[at : at + lengths[-1]] = store.loss_mask[begin:end]
        at += lengths[-1]
    layout = PackedLayout.build(lengths, ratios, row_tokens)
    ids = tuple(store.ids[s] for s in samples.tolist())
    return Batch(torch.from_numpy(tokens), torch.from_numpy(loss_mask), layout, ids)


def batch_digest(batch: Batch) -> str:
    """What stands for a row in the ledger: SHA-256, in hex, of its tokens (int64, little-endian), its loss mask
    (fp32, little-endian), and its document lengths as JSON without spaces; padding is the last document.
    """
    hasher = hashlib.sha256()
    hasher.update(batch.tokens.cpu().numpy().astype("<i8").data)
    hasher.update(batch.loss_mask.cpu().numpy().astype("<f4").data)
    hasher.update(json.dumps(batch.layout.document_lengths, separators=(",", ":")).encode())
    return hasher.hexdigest()


def _identity(config: DataConfig, prepared: Prepared) -> str:
    settings = [prepared.key, config.row_tokens, config.shuffle_window, config.seed, config.weights()]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def _rank_rows(
    prepared: Prepared,
    config: DataConfig,
    cursor: _Cursor,
    *,
    rank: int,
    world_size: int,
    ratios: Sequence[int],
    pad_id: int,
) -> Iterator[tuple[Batch, _Cursor]]:
    """This rank's batches from `cursor` on, each with the cursor once every rank has taken one.

    A function and not a method, so that the background thread keeps no loader alive.
    """
    rows = _all_rows(prepared, config, cursor)
    while True:
        turn = list(islice(rows, world_size))
        batch = make_batch(prepared.train, turn[rank][0], config.row_tokens, ratios, pad_id)
        yield replace(batch, digest=batch_digest(batch)), turn[-1][1]


def _all_rows(prepared: Prepared, config: DataConfig, cursor: _Cursor) -> Iterator[tuple[Indices, _Cursor]]:
    """The samples of each row from `cursor` on, with the cursor after it."""
    epoch, first = cursor.epoch, cursor.row
    while True:
        plan = epoch_plan(prepared, config, epoch)
        for row in range(first, plan.num_rows):
            yield plan.row(row), _Cursor(epoch, row + 1)
        epoch, first = epoch + 1, 0
