"""Sources -> split, de-duplicated, tokenised samples in flat arrays.

Tokens of all samples lie end to end in one int32 array, their loss mask in a uint8 array, and `offsets` says
where each begins: 5 bytes a token, and a sample is a slice. With a cache folder the arrays are written once
and then memory-mapped, so that the ranks of a machine share one copy and a restart does not tokenise again.
The cache key is made of every sample's content, the tokenizer and every setting that matters: a changed
file is a different key, never a stale hit.

Sources are read twice (split, then encode), which keeps no text in memory but the held-out samples.

Left out: encoding in several processes; the tokenizer runs on all cores, and the cache keeps the result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from fullweight.core.config import Config
from fullweight.core.errors import DataError
from fullweight.data.render import EncodedSample, EncodingOptions, encode_sample, encode_samples
from fullweight.data.sources import FileSource, Record, SourceConfig, SynthSource, question_digest, read
from fullweight.data.tokenizer import Tokenizer

_FORMAT = 1
_BATCH = 256


class DataConfig(Config):
    """What is trained on, how it is split, encoded, packed and dealt out."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    held_out: tuple[SourceConfig, ...] = Field((), description="separate sources never trained on")
    held_out_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of questions kept from training, chosen by hash of their content"
    )
    tokenizer: str = Field("deepseek-v4", description='"deepseek-v4" or a folder with tokenizer.json')
    encoding: EncodingOptions = EncodingOptions()
    row_tokens: PositiveInt = Field(description="T, tokens of a packed row")
    too_long: Literal["truncate", "drop", "refuse"] = Field(
        "refuse", description="a sample of more than T tokens: keep its first T, leave it out, or stop"
    )
    shuffle_window: PositiveInt = Field(65536, description="samples that may meet in one row")
    seed: NonNegativeInt = 0
    prefetch: PositiveInt = Field(4, description="rows made ahead in the background")
    cache_folder: Path | None = Field(None, description="where token arrays are kept between runs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.held_out and self.held_out_fraction:
            raise ValueError("held_out sources and held_out_fraction exclude each other; give one")
        if any(s.weight is not None for s in self.held_out):
            raise ValueError("a held_out source takes no weight; every sample of it is scored once")
        weighted = sum(s.weight is not None for s in self.sources)
        if weighted not in (0, len(self.sources)):
            raise ValueError(
                f"{weighted} of {len(self.sources)} sources have a weight; give one to all (shares of an "
                "epoch) or to none (every sample once)"
            )
        return self

    def weights(self) -> list[float] | None:
        """Weight of each source, or None when an epoch is every sample once."""
        weights = [s.weight for s in self.sources if s.weight is not None]
        return weights or None


@dataclass
class SplitCounts:
    """What became of one source's encoded samples on one side of the split; a record may make several."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_untrained: int = 0


@dataclass
class SourceCounts:
    """What became of one source's records."""

    name: str
    records: int = 0
    duplicates: int = 0
    also_held_out: int = 0
    train: SplitCounts = field(default_factory=SplitCounts)
    held_out: SplitCounts = field(default_factory=SplitCounts)


def told_counts(counts: Sequence[SourceCounts]) -> list[str]:
    """A line for each source of which samples were cut or left out, for a person."""
    lines = []
    for count in counts:
        sides = (count.train, count.held_out)
        found = {
            "truncated": sum(s.truncated for s in sides),
            "dropped as too long": sum(s.dropped_too_long for s in sides),
            "dropped without a trained token": sum(s.dropped_untrained for s in sides),
        }
        if any(found.values()):
            kept = sum(s.samples for s in sides)
            parts = ", ".join(f"{number:,} {what}" for what, number in found.items() if number)
            lines.append(f"note: {count.name}: {kept:,} samples kept, {parts}")
    return lines


@dataclass(frozen=True)
class TokenStore:
    """Tokenised samples: sample i is `tokens[offsets[i]:offsets[i + 1]]`, of source `source[i]`."""

    tokens: NDArray[np.int32]  # [total]
    loss_mask: NDArray[np.uint8]  # [total] 1 where the model must learn to emit that token
    offsets: NDArray[np.int64]  # [num_samples + 1]
    source: NDArray[np.int32]  # [num_samples]
    ids: tuple[str, ...]  # [num_samples]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_samples] tokens of each sample."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Prepared:
    """Everything a loader needs; `key` is the hex digest of the content and settings that made it."""

    train: TokenStore
    held_out: TokenStore
    held_out_samples: tuple[dict[str, Any], ...]
    counts: tuple[SourceCounts, ...]
    key: str
    encode_seconds: float | None  # None when the token arrays came from the cache
    train_digests: bytes = b""  # content digests, 16 bytes each, of the samples that the split put here, as read
    held_out_digests: bytes = b""


class _Verdict(IntEnum):
    TRAIN = 0
    HELD_OUT = 1
    DROPPED = 2


def prepare(config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """Read, split, de-duplicate and tokenise all sources.

    A sample equal to an earlier one is dropped, and so is a training sample whose question is held out. A
    sample without a trained token (the first token of a document is predicted by none) is dropped. All are
    counted. Raises DataError on bad data, on a sample longer than a row where `too_long` is "refuse", and
    when no training sample is left.
    """
    counts = [SourceCounts(s.name) for s in (*config.sources, *config.held_out)]
    verdicts, held_out_samples, key, digests = _split(config, tokenizer, counts)
    folder = config.cache_folder / key if config.cache_folder is not None else None
    if folder is not None and folder.is_dir():
        train, held_out, counts = _load(folder, config)
        seconds = None
    else:
        begin = time.perf_counter()
        train, held_out = _encode(config, tokenizer, verdicts, counts)
        seconds = time.perf_counter() - begin
        if folder is not None:
            _save(folder, train, held_out, counts)
            train, held_out, counts = _load(folder, config)
    _check_trainable(config, counts)
    return Prepared(train, held_out, tuple(held_out_samples), tuple(counts), key, seconds, *digests)


def _check_trainable(config: DataConfig, counts: list[SourceCounts]) -> None:
    training = counts[: len(config.sources)]
    lacking = [c for c in training if c.train.samples == 0]
    if len(lacking) == len(training) or (lacking and config.weights() is not None):
        c = lacking[0]
        raise DataError(
            f"{c.name}: no training sample is left of {c.records}: {c.duplicates} duplicates, "
            f"{c.also_held_out} with a held-out question, {c.held_out.samples} held out, "
            f"{c.train.dropped_too_long} too long, {c.train.dropped_untrained} without a trained token"
        )


def _all_records(config: DataConfig) -> Iterator[tuple[int, Record]]:
    """Held-out sources first, so that what they ask is known before training samples come."""
    sources: list[FileSource | SynthSource] = [*config.sources, *config.held_out]
    for number in (*range(len(config.sources), len(sources)), *range(len(config.sources))):
        for record in read(sources[number]):
            yield number, record


def _split(
    config: DataConfig, tokenizer: Tokenizer, counts: list[SourceCounts]
) -> tuple[bytearray, list[dict[str, Any]], str, tuple[bytes, bytes]]:
    """(verdict of each record, held-out samples, cache key, content digests of either side)."""
    settings = [_FORMAT, config.encoding.model_dump(mode="json"), config.row_tokens, config.too_long]
    hasher = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    hasher.update(_fingerprint(tokenizer))
    seen: set[bytes] = set()
    held_out_questions: set[bytes] = set()
    verdicts, held_out_samples = bytearray(), []
    digests = {_Verdict.TRAIN: bytearray(), _Verdict.HELD_OUT: bytearray()}
    for number, record in _all_records(config):
        digest = bytes.fromhex(record.digest)
        question = bytes.fromhex(question_digest(record.sample))
        counts[number].records += 1
        verdict = _Verdict.TRAIN
        if digest in seen:
            verdict = _Verdict.DROPPED
            counts[number].duplicates += 1
        elif number >= len(config.sources):
            verdict = _Verdict.HELD_OUT
            held_out_questions.add(question)
        elif question in held_out_questions:
            verdict = _Verdict.DROPPED
            counts[number].also_held_out += 1
        elif int.from_bytes(question[:8], "little") < config.held_out_fraction * 2**64:
            verdict = _Verdict.HELD_OUT
        seen.add(digest)
        if verdict == _Verdict.HELD_OUT:
            held_out_samples.append(record.sample)
        verdicts.append(verdict)
        if verdict in digests:
            digests[verdict] += digest
        hasher.update(digest + bytes([number % 256, verdict]) + record.sample["id"].encode() + b"\0")
    sides = bytes(digests[_Verdict.TRAIN]), bytes(digests[_Verdict.HELD_OUT])
    return verdicts, held_out_samples, hasher.hexdigest(), sides


def _fingerprint(tokenizer: Tokenizer) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return hashlib.blake2b((Path(folder) / "tokenizer.json").read_bytes()).digest()


class _Builder:
    """Grows a TokenStore sample by sample."""

    def __init__(self) -> None:
        self.tokens, self.loss_mask = array("i"), bytearray()
        self.offsets, self.source = array("q", [0]), array("i")
        self.ids: list[str] = []

    def add(self, sample: EncodedSample, source: int) -> None:
        self.tokens.extend(sample.tokens)
        self.loss_mask.extend(sample.loss_mask)
        self.offsets.append(len(self.tokens))
        self.source.append(source)
        self.ids.append(sample.id)

    def finish(self) -> TokenStore:
        return TokenStore(
            np.frombuffer(self.tokens, dtype=np.int32),
            np.frombuffer(self.loss_mask, dtype=np.uint8),
            np.frombuffer(self.offsets, dtype=np.int64),
            np.frombuffer(self.source, dtype=np.int32),
            tuple(self.ids),
        )


def _encode(
    config: DataConfig, tokenizer: Tokenizer, verdicts: bytearray, counts: list[SourceCounts]
) -> tuple[TokenStore, TokenStore]:
    train, held_out = _Builder(), _Builder()
    kept = (
        (number, record, verdict)
        for (number, record), verdict in zip(_all_records(config), verdicts, strict=True)
        if verdict != _Verdict.DROPPED
    )
    while batch := list(islice(kept, _BATCH)):
        encoded = _encode_records([record for _, record, _ in batch], tokenizer, config.encoding)
        for (number, record, verdict), samples in zip(batch, encoded, strict=True):
            builder, side = train, counts[number].train
            if verdict == _Verdict.HELD_OUT:
                builder, side = held_out, counts[number].held_out
            side.dropped_untrained += not samples
            for sample in samples:
                fitting = _fit(sample, config, side, record.where)
                if fitting is not None:
                    builder.add(fitting, number)
                    side.samples += 1
                    side.tokens += len(fitting.tokens)
                    side.trained_tokens += sum(fitting.loss_mask[1:])
    return train.finish(), held_out.finish()


def _encode_records(
    records: list[Record], tokenizer: Tokenizer, options: EncodingOptions
) -> list[list[EncodedSample]]:
    """Training samples of each record; none of a conversation all of whose answers opted out of training."""
    encoded: list[list[EncodedSample]] = [[] for _ in records]
    wanted = [i for i, record in enumerate(records) if not _opted_out(record.sample)]
    try:
        results = list(encode_samples([records[i].sample for i in wanted], tokenizer, options))
    except DataError:
        for i in wanted:
            try:
                encode_sample(records[i].sample, tokenizer, options)
            except DataError as error:
                raise DataError(f"{records[i].where}: {error}") from None
        raise
    for i, result in zip(wanted, results, strict=True):
        encoded[i] = result
    return encoded


def _opted_out(sample: dict[str, Any]) -> bool:
    answers = [m for m in sample.get("messages", ()) if m["role"] == "assistant"]
    return bool(answers) and all(False in (m.get("train"), m.get("mask")) for m in answers)


def _fit(sample: EncodedSample, config: DataConfig, side: SplitCounts, where: str) -> EncodedSample | None:
    """The sample as it is kept, or None where it is dropped; counts what was done."""
    if len(sample.tokens) > config.row_tokens:
        if config.too_long == "refuse":
            raise DataError(
                f"{where}: a sample of {len(sample.tokens)} tokens does not fit a row of "
                f"{config.row_tokens}; raise data.row_tokens, or set data.too_long to truncate or drop"
            )
        if config.too_long == "drop":
            side.dropped_too_long += 1
            return None
        side.truncated += 1
        kept = slice(config.row_tokens)
        sample = EncodedSample(sample.tokens[kept], sample.loss_mask[kept], sample.id)
    if not any(sample.loss_mask[1:]):
        side.dropped_untrained += 1
        return None
    return sample


_ARRAYS = ("tokens", "loss_mask", "offsets", "source")


def _save(folder: Path, train: TokenStore, held_out: TokenStore, counts: list[SourceCounts]) -> None:
    """Write beside and rename, so that a folder with its final name is whole; another rank may come first."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            for side, store in (("train", train), ("held_out", held_out)):
                for name in _ARRAYS:
                    np.save(partial / f"{side}_{name}.npy", getattr(store, name))
            ids = {"train": train.ids, "held_out": held_out.ids}
            text = json.dumps({"ids": ids, "counts": [asdict(c) for c in counts]})
            (partial / "samples.json").write_text(text, encoding="utf-8")
            if not folder.is_dir():
                _rename_unless_there(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {folder}: {error}; free space or set data.cache_folder"
        ) from None


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _load(folder: Path, config: DataConfig) -> tuple[TokenStore, TokenStore, list[SourceCounts]]:
    try:
        kept = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        stores = []
        for side in ("train", "held_out"):
            arrays = {n: np.load(folder / f"{side}_{n}.npy", mmap_mode="r") for n in _ARRAYS}
            stores.append(TokenStore(**arrays, ids=tuple(kept["ids"][side])))
            if not len(arrays["tokens"]) == len(arrays["loss_mask"]) == arrays["offsets"][-1]:
                raise ValueError("array lengths disagree")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the token cache {folder} is damaged ({error}); delete that folder") from None
    counts = [
        SourceCounts(
            source.name,
            c["records"],
            c["duplicates"],
            c["also_held_out"],
            SplitCounts(**c["train"]),
            SplitCounts(**c["held_out"]),
        )
        for source, c in zip((*config.sources, *config.held_out), kept["counts"], strict=True)
    ]
    return stores[0], stores[1], counts
