"""Preparation: the split, de-duplication, the policies for awkward samples, and the token cache."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fullweight.core.errors import ConfigError, DataError
from fullweight.data.tokenised import DataConfig, prepare
from fullweight.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is 1 + 2 ? it is 3"] * 4, vocab_size=400)


def chat(question, answer="3", **extra):
    said = {"role": "assistant", "content": answer, **extra}
    return {"messages": [{"role": "user", "content": question}, said]}


def source(path, *samples):
    path.write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return {"kind": "file", "path": str(path)}


def config(*sources, **options):
    return DataConfig.resolve({"sources": sources, "row_tokens": 256, **options})


def questions(samples):
    return {s["messages"][0]["content"] for s in samples}


def test_stored_tokens_are_the_encoding(tmp_path, tokenizer):
    """A slice of the flat arrays decodes to the rendered sample; its mask covers the answer and EOS."""
    prepared = prepare(config(source(tmp_path / "a.jsonl", chat("what"), chat("why", "it is"))), tokenizer)
    store = prepared.train
    for index, answer in enumerate(("3", "it is")):
        span = slice(store.offsets[index], store.offsets[index + 1])
        tokens, mask = store.tokens[span], store.loss_mask[span]
        trained = tokenizer.decode(tokens[mask == 1].tolist())
        assert trained.replace("</think>", "").startswith(answer)
        assert tokens[0] == tokenizer.bos_id
        assert tokens[-1] == tokenizer.eos_id
        assert mask[-1] == 1
    counts = prepared.counts[0].train
    assert (counts.samples, counts.tokens) == (2, len(store.tokens))
    assert counts.trained_tokens == store.loss_mask.sum()


def test_split_depends_on_content_not_order(tmp_path, tokenizer):
    """Reversing the file moves no sample to the other side; about the asked share is held out."""
    samples = [chat(f"question {i}") for i in range(300)]
    first = prepare(config(source(tmp_path / "a.jsonl", *samples), held_out_fraction=0.2), tokenizer)
    second = prepare(config(source(tmp_path / "b.jsonl", *samples[::-1]), held_out_fraction=0.2), tokenizer)
    held_out = questions(first.held_out_samples)
    assert held_out == questions(second.held_out_samples)
    assert 35 <= len(held_out) <= 85  # 60 expected, standard deviation 6.9
    assert first.counts[0].train.samples == 300 - len(held_out)


def test_no_held_out_question_is_trained(tmp_path, tokenizer):
    """Repeats, and other answers to a held-out question, never cross to training; drops are counted."""
    samples = [chat(f"question {i}", a) for i in range(60) for a in ("3", "4", "3")]
    prepared = prepare(config(source(tmp_path / "a.jsonl", *samples), held_out_fraction=0.3), tokenizer)
    counts = prepared.counts[0]
    assert counts.duplicates == 60
    assert counts.train.samples + counts.held_out.samples == 120
    assert len(prepared.held_out_samples) == 2 * len(questions(prepared.held_out_samples))

    training = source(tmp_path / "t.jsonl", *(chat(f"question {i}", "5") for i in range(20)), chat("question 3"))
    separate = source(tmp_path / "h.jsonl", chat("question 3"), chat("question 4"), chat("new"))
    prepared = prepare(config(training, held_out=[separate]), tokenizer)
    train, held_out = prepared.counts
    assert (train.also_held_out, train.duplicates, train.train.samples) == (2, 1, 18)
    assert held_out.held_out.samples == 3
    assert not set(prepared.train.ids) & set(prepared.held_out.ids)


def test_a_sample_longer_than_a_row_follows_the_policy(tmp_path, tokenizer):
    """refuse names the line and the length; drop and truncate count; exactly T is not too long."""
    short, long = chat("why"), chat("why", "it is 3 " * 200)
    file = source(tmp_path / "a.jsonl", short, long)
    with pytest.raises(DataError, match=r"a.jsonl:2: a sample of \d+ tokens does not fit a row of 256"):
        prepare(config(file), tokenizer)
    dropped = prepare(config(file, too_long="drop"), tokenizer)
    assert (dropped.counts[0].train.samples, dropped.counts[0].train.dropped_too_long) == (1, 1)
    cut = prepare(config(file, too_long="truncate"), tokenizer)
    assert (cut.counts[0].train.samples, cut.counts[0].train.truncated) == (2, 1)
    assert cut.train.lengths[1] == 256
    whole = prepare(config(file, row_tokens=100_000), tokenizer)
    assert cut.train.tokens[-256:].tolist() == whole.train.tokens[whole.train.offsets[1] :][:256].tolist()
    exactly = int(whole.train.lengths[1])
    assert prepare(config(file, row_tokens=exactly), tokenizer).counts[0].train.truncated == 0


def test_samples_with_nothing_to_learn_are_dropped_and_counted(tmp_path, tokenizer):
    """An answer cut away by truncation, or opted out of training, is counted and not kept."""
    cut = chat("it is 3 " * 200)
    opted_out = chat("what", train=False)
    prepared = prepare(
        config(source(tmp_path / "a.jsonl", cut, opted_out, chat("why")), too_long="truncate"), tokenizer
    )
    counts = prepared.counts[0].train
    assert (counts.dropped_untrained, counts.truncated, counts.samples) == (2, 1, 1)
    with pytest.raises(DataError, match=r"no training sample is left of 1: .* 1 without a trained token"):
        prepare(config(source(tmp_path / "b.jsonl", opted_out)), tokenizer)


def test_what_the_encoding_refuses_is_named_by_line(tmp_path, tokenizer):
    """An unknown role deep inside a file is reported with its line, although encoding is in batches."""
    bad = {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}
    file = source(tmp_path / "a.jsonl", *(chat(f"q {i}") for i in range(700)), bad)
    with pytest.raises(DataError, match=r"a.jsonl:701: .*wizard"):
        prepare(config(file), tokenizer)


def test_the_cache_gives_the_same_and_notices_changes(tmp_path, tokenizer):
    """A second preparation reads the arrays; another content, option or tokenizer makes another entry."""
    samples = [chat(f"question {i}") for i in range(40)]
    options = {"held_out_fraction": 0.2, "cache_folder": str(tmp_path / "cache")}
    setup = config(source(tmp_path / "a.jsonl", *samples), **options)
    first, second = prepare(setup, tokenizer), prepare(setup, tokenizer)
    assert first.encode_seconds is not None
    assert second.encode_seconds is None
    assert isinstance(second.train.tokens, np.memmap)
    plain = prepare(config(*setup.model_dump()["sources"], held_out_fraction=0.2), tokenizer)
    for side in ("train", "held_out"):
        for name in ("tokens", "loss_mask", "offsets", "source", "ids"):
            assert list(getattr(getattr(plain, side), name)) == list(getattr(getattr(second, side), name))
    assert second.counts == plain.counts
    assert second.held_out_samples == plain.held_out_samples

    source(tmp_path / "a.jsonl", *samples[:-1], chat("question 39", "4"))
    keys = {first.key, prepare(setup, tokenizer).key}
    other = train_tokenizer(["a different text about 1 and 2"] * 4, vocab_size=400)
    keys |= {prepare(setup, other).key}
    keys |= {prepare(setup.model_copy(update={"row_tokens": 300}), tokenizer).key}
    assert len(keys) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4  # nothing partial is left behind


def test_a_damaged_or_unwritable_cache_is_one_message(tmp_path, tokenizer):
    """A cut array or a cache folder that cannot be made is a DataError naming it, never wrong tokens."""
    setup = config(source(tmp_path / "a.jsonl", chat("why")), cache_folder=str(tmp_path / "cache"))
    folder = tmp_path / "cache" / prepare(setup, tokenizer).key
    array = folder / "train_tokens.npy"
    array.write_bytes(array.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"token cache .* is damaged .*; delete that folder"):
        prepare(setup, tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the token cache"):
        prepare(setup.model_copy(update={"cache_folder": tmp_path / "file" / "cache"}), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": [{"kind": "file", "path": "h.jsonl"}], "held_out_fraction": 0.1}, "exclude each other"),
        ({"held_out": [{"kind": "file", "path": "h.jsonl", "weight": 1.0}]}, "takes no weight"),
        ({"sources": []}, "at least 1 item"),
        ({"row_tokens": 0}, "row_tokens"),
        ({"too_long": "cut"}, "too_long"),
        ({"row_token": 5}, "did you mean 'row_tokens'"),
    ],
)
def test_wrong_settings_fail_before_any_file_is_opened(options, message):
    """Contradictions and typos are ConfigErrors; the files named do not even exist."""
    values = {"sources": [{"kind": "file", "path": "a.jsonl"}], "row_tokens": 256, **options}
    with pytest.raises(ConfigError, match=message):
        DataConfig.resolve(values)
    one_weight = [{"kind": "file", "path": "a.jsonl", "weight": 1.0}, {"kind": "file", "path": "b.jsonl"}]
    with pytest.raises(ConfigError, match="1 of 2 sources have a weight"):
        DataConfig.resolve({"sources": one_weight, "row_tokens": 256})
