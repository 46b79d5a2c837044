"""The loader: every token once per epoch, exact resume anywhere, and ranks that share one sequence."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.core.errors import DataError
from fullweight.data.loader import PackedLoader, batch_digest, epoch_plan, make_batch
from fullweight.data.tokenised import DataConfig, Prepared, SourceCounts, TokenStore, prepare
from fullweight.data.tokenizer import load_tokenizer

T, PAD = 24, 2
TOKENIZER = SimpleNamespace(pad_id=PAD)
SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
lengths_of = st.lists(st.integers(1, T), min_size=1, max_size=30)


def store_of(lengths, sources=None):
    """Samples whose tokens are all different, so that a multiset of tokens says exactly what was seen."""
    total = sum(lengths)
    return TokenStore(
        np.arange(100, 100 + total, dtype=np.int32),
        (np.arange(total) % 3 != 0).astype(np.uint8),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.array(sources or [0] * len(lengths), dtype=np.int32),
        tuple(f"s{i}" for i in range(len(lengths))),
    )


def prepared_of(lengths, held_out=(), sources=None, key="k"):
    counts = tuple(SourceCounts(f"source {s}") for s in range(1 + max(sources or [0])))
    return Prepared(store_of(lengths, sources), store_of(held_out), (), counts, key, None)


def config_of(weights=(None,), **options):
    sources = [{"kind": "file", "path": "unused.jsonl", "weight": w} for w in weights]
    return DataConfig.resolve({"sources": sources, "row_tokens": T, "prefetch": 3, **options})


def loader_of(prepared, config=None, **options):
    return PackedLoader(config or config_of(), TOKENIZER, prepared=prepared, **options)


def real_tokens(batch):
    return batch.tokens[: batch.num_tokens - batch.layout.num_padding].tolist()


def take(loader, count):
    return [batch_digest(b) for b in islice(loader, count)]


@settings(deadline=None, max_examples=30)
@given(lengths_of, st.integers(0, 2), st.integers(1, 8))
def test_every_token_is_seen_once_per_epoch(lengths, seed, window):
    """Each of two epochs gives every token of every sample once, with its own mask, in rows of exactly T."""
    prepared, config = prepared_of(lengths), config_of(seed=seed, shuffle_window=window)
    mask = dict(zip(prepared.train.tokens.tolist(), prepared.train.loss_mask.tolist(), strict=True))
    with loader_of(prepared, config) as loader:
        for epoch in range(2):
            seen: Counter[int] = Counter()
            for batch in islice(loader, epoch_plan(prepared, config, epoch).num_rows):
                assert batch.tokens.shape == batch.loss_mask.shape == (T,)
                assert sum(batch.layout.document_lengths) == T
                tokens = real_tokens(batch)
                assert [mask[t] for t in tokens] == batch.loss_mask[: len(tokens)].tolist()
                assert set(batch.tokens[len(tokens) :].tolist()) <= {PAD}
                assert not batch.loss_mask[len(tokens) :].any()
                assert len(batch.sample_ids) == batch.layout.num_documents
                seen.update(tokens)
            assert seen == Counter(prepared.train.tokens.tolist())


@settings(deadline=None, max_examples=15)
@given(lengths_of, st.integers(1, 4), st.integers(0, 2))
def test_resume_at_every_position_continues_identically(lengths, world_size, seed):
    """Whatever was made ahead, a new loader with the state after batch n gives batch n + 1 and all after."""
    prepared, config = prepared_of(lengths), config_of(seed=seed)
    steps = 2 * epoch_plan(prepared, config, 0).num_rows // world_size + 2
    with loader_of(prepared, config, rank=world_size - 1, world_size=world_size) as loader:
        states, digests = [loader.state_dict()], []
        for batch in islice(loader, steps):
            digests.append(batch_digest(batch))
            states.append(json.loads(json.dumps(loader.state_dict())))
    for position, state in enumerate(states):
        with loader_of(prepared, config, rank=world_size - 1, world_size=world_size) as resumed:
            next(resumed)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert take(resumed, steps - position) == digests[position:]


@settings(deadline=None, max_examples=12)
@given(lengths_of, st.integers(1, 5))
def test_ranks_share_one_sequence_of_rows(lengths, world_size):
    """Row g goes to rank g % world_size, so that the ranks' rows interleave to what one rank alone sees."""
    prepared = prepared_of(lengths)
    shares, states = [], []
    for rank in range(world_size):
        with loader_of(prepared, rank=rank, world_size=world_size) as loader:
            shares.append(take(loader, 6))
            states.append(loader.state_dict())
    with loader_of(prepared) as alone:
        assert [share[step] for step in range(6) for share in shares] == take(alone, 6 * world_size)
        assert states == [alone.state_dict()] * world_size
    with loader_of(prepared) as single, loader_of(prepared, rank=1, world_size=2) as second_of_two:
        for loader in (single, second_of_two):
            loader.load_state_dict(states[0])
        assert take(second_of_two, 2) == take(single, 4)[1::2]


def test_the_layout_is_that_of_the_documents():
    """Document lengths, ids and compression tables of a row are those of its samples, in order."""
    store = store_of([5, 9, 3])
    batch = make_batch(store, np.array([2, 1]), T, ratios=(4,), pad_id=PAD)
    assert batch.layout.document_lengths == (3, 9, 12)
    assert batch.layout.num_padding == 12
    assert batch.sample_ids == ("s2", "s1")
    assert batch.tokens[:12].tolist() == [*range(114, 117), *range(105, 114)]
    assert batch.layout.tables[4].entry_tokens[:2].tolist() == [3, 7]
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (torch.int64, torch.float32)


def test_unusual_packs():
    """One sample, a sample of exactly T, samples of one token, and 50 documents in one row."""
    with loader_of(prepared_of([T])) as loader:
        batch = next(loader)
        assert (batch.layout.num_padding, batch.layout.num_documents) == (0, 1)
        assert take(loader, 2) == [batch_digest(batch)] * 2
    with loader_of(prepared_of([1])) as loader:
        assert real_tokens(next(loader)) == [100]
    with loader_of(prepared_of([1] * 50), config_of(row_tokens=64)) as loader:
        batch = next(loader)
        assert batch.layout.num_documents == 50
        assert sorted(real_tokens(batch)) == list(range(100, 150))


def test_weighted_sources_give_their_shares():
    """Sources of 4 and 12 samples at weights 1 : 1 give 8 samples each to an epoch of 16."""
    prepared = prepared_of([3] * 16, sources=[0] * 4 + [1] * 12)
    config = config_of(weights=(1.0, 1.0))
    with loader_of(prepared, config) as loader:
        rows = list(islice(loader, epoch_plan(prepared, config, 0).num_rows))
    seen = Counter(i for batch in rows for i in batch.sample_ids)
    assert [seen[f"s{i}"] for i in range(4)] == [2, 2, 2, 2]
    assert sum(seen[f"s{i}"] for i in range(4, 16)) == 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_held_out_batches_are_even_over_ranks_and_complete(world_size):
    """All ranks get equally many; what fills up has no loss and no ids; every sample is there once."""
    prepared = prepared_of([T], held_out=[20, 20, 20, 4, 4, 11, 13])
    loaders = [loader_of(prepared, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [loader.held_out_batches() for loader in loaders]
    assert {len(share) for share in shares} == {-(-4 // world_size)}
    batches = [b for share in shares for b in share]
    assert sorted(i for b in batches for i in b.sample_ids) == [f"s{i}" for i in range(7)]
    assert sum(b.loss_mask.sum() for b in batches) == prepared.held_out.loss_mask.sum()
    assert [batch_digest(b) for b in loaders[0].held_out_batches()] == [batch_digest(b) for b in shares[0]]
    for loader in loaders:
        loader.close()
    with loader_of(prepared_of([T])) as loader:
        assert loader.held_out_batches() == []


def test_a_state_of_other_data_is_refused():
    """Other samples, seed or packing make the position meaningless: one clear error, no silent restart."""
    with loader_of(prepared_of([3, 4])) as loader:
        state = loader.state_dict()
    others = [(prepared_of([3, 4], key="other"), config_of()), (prepared_of([3, 4]), config_of(seed=1))]
    for prepared, config in others:
        with loader_of(prepared, config) as loader, pytest.raises(DataError, match="saved with other data"):
            loader.load_state_dict(state)


def test_a_background_error_is_raised_where_the_row_was_due(monkeypatch):
    """Rows before the bad one arrive; its error reaches the consumer at each try; state stays."""
    calls = []

    def breaking(*args):
        calls.append(threading.current_thread().name)
        if len(calls) >= 3:
            raise OSError("disk gone")
        return make_batch(*args)

    monkeypatch.setattr("fullweight.data.loader.make_batch", breaking)
    with loader_of(prepared_of([20] * 5)) as loader:
        assert len(take(loader, 2)) == 2
        state = loader.state_dict()
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(loader)
            assert loader.state_dict() == state
    assert all(name.startswith("fullweight-data") for name in calls)


def test_rows_are_made_ahead_and_the_thread_ends(monkeypatch):
    """While the consumer is busy, `prefetch` rows are made and no more; the thread ends with its loader."""

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("fullweight-data")]

    made = []
    monkeypatch.setattr("fullweight.data.loader.make_batch", lambda *a: made.append(1) or make_batch(*a))
    loader = loader_of(prepared_of([20] * 50), config_of(prefetch=4))
    next(loader)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    loader.close()
    assert not threads()
    with pytest.raises(RuntimeError):
        next(loader)
    forgotten = loader_of(prepared_of([20] * 50))
    next(forgotten)
    del forgotten
    gc.collect()
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_batch_digest_sees_tokens_mask_and_documents():
    """Any difference that training could notice changes the digest; ids do not."""
    store = store_of([4, 4])
    digests = {batch_digest(make_batch(store, np.array(row), T, (), PAD)) for row in ([0], [1], [0, 1], [1, 0])}
    assert len(digests) == 4
    batch = make_batch(store, np.array([0]), T, (), PAD)
    longer = store_of([8])
    assert batch_digest(make_batch(longer, np.array([0]), T, (), PAD)) != batch_digest(
        make_batch(store, np.array([0, 1]), T, (), PAD)
    )
    batch.loss_mask[1] = 0
    assert batch_digest(batch) not in digests


@pytest.mark.shared_data
def test_real_data_packs_to_97_percent():
    """The 200 OR samples, released tokenizer, T = 8192: at least 97 % real tokens in each of three epochs."""
    file = {
        "kind": "file",
        "path": str(SHARED / "or_sft.jsonl"),
        "columns": {"prompt": "problem", "answer": "answer"},
    }
    config = DataConfig.resolve({"sources": [file], "row_tokens": 8192})
    prepared = prepare(config, load_tokenizer("deepseek-v4"))
    assert prepared.counts[0].train.samples == 200
    for epoch in range(3):
        plan = epoch_plan(prepared, config, epoch)
        assert len(prepared.train.tokens) / (plan.num_rows * 8192) >= 0.97
