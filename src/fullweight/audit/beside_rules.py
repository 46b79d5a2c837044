"""Rules about what lies beside a bundle: exported weights, and the data that a recipe names.

The folder of the run is given by whoever verifies. Its configuration says where the data are, and it is looked at
only when asked for (`--data`): reading them takes as long as it took the run. With the data every batch is made
again, without the model: its digest, tokens and query-key pairs are those of the ledger or they are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fullweight.audit.rule import NotCheckableError, rule
from fullweight.audit.subject import Subject
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.receipt import RECEIPT, compare
from fullweight.core.errors import CheckpointError, DataError, FullweightError
from fullweight.data.identify import identify
from fullweight.data.loader import PackedLoader
from fullweight.data.tokenised import Prepared, prepare
from fullweight.data.tokenizer import Tokenizer, load_tokenizer
from fullweight.evidence import merkle
from fullweight.evidence.lines import EventLine, StepLine
from fullweight.evidence.manifest import DataFile, files_root
from fullweight.models.deepseek_v4.flops import Pairs
from fullweight.train.assemble import questions_of
from fullweight.train.config import RunConfig
from fullweight.train.evaluate import samples_digest
from fullweight.train.loop import load_config
from fullweight.train.run_folder import RunFolder

_DIGEST_BYTES = 16


@rule(
    "export.complete",
    proves="the exported folder holds every tensor of the model, none left over, each of its shape: it is a whole "
    "model and no adapter",
)
def _complete(subject: Subject) -> Iterator[str]:
    folder, _ = _export(subject)
    try:
        with PublishedFolder(folder) as found:
            if found.config.to_published() != subject.model and _sizes(found.config.to_published(), subject.model):
                yield "the exported weights are of a model of other sizes"
    except FullweightError as error:
        yield str(error)


@rule(
    "export.bytes",
    proves="every exported tensor has the SHA-256 that was recorded when it was written at the end of the run",
)
def _bytes(subject: Subject) -> Iterator[str]:
    folder, event = _export(subject)
    receipt = folder / RECEIPT
    if not receipt.is_file():
        yield f"{RECEIPT} is missing beside the exported weights"
        return
    found = hashlib.sha256(receipt.read_bytes()).hexdigest()
    if found != event.get("receipt_sha256"):
        yield f"{RECEIPT} has SHA-256 {found[:12]}..., {str(event.get('receipt_sha256'))[:12]}... was recorded"
        return
    try:
        with PublishedFolder(folder, hashing=True) as opened:
            compare(opened, receipt)
    except FullweightError as error:
        yield str(error)


@rule("data.files", proves="the data files are the ones whose digests the manifest fixed before the first step")
def _files(subject: Subject) -> Iterator[str]:
    config, stated = _config(subject), subject.manifest.data
    try:
        found = identify(config.data)
    except DataError as error:
        raise NotCheckableError(str(error)) from None
    files = tuple(DataFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in found.files)
    now = {f.name: f for f in files}
    for file in stated.files:
        if file.name not in now:
            yield f"{file.name[:100]} is not among the data"
        elif now[file.name].sha256 != file.sha256:
            found_now = now[file.name].sha256
            yield f"{file.name[:100]} has SHA-256 {found_now[:12]}..., {file.sha256[:12]}... was trained on"
    if files_root(files) != stated.merkle_root and {f.name for f in stated.files} == now.keys():
        yield "the Merkle root over the data files is not the one that the manifest states"


@rule(
    "data.samples", proves="the samples that are trained on and held out are those whose roots the manifest fixed"
)
def _samples(subject: Subject) -> Iterator[str]:
    prepared, stated = _prepared(subject)[1], subject.manifest.data
    for what, digests, side in (
        ("training", prepared.train_digests, stated.train),
        ("held-out", prepared.held_out_digests, stated.held_out),
    ):
        leaves = _leaves(digests)
        if (len(leaves), merkle.root(leaves)) != (side.number, side.merkle_root):
            yield f"{len(leaves):,} {what} samples with another root than the {side.number:,} of the manifest"


@rule(
    "data.held-out",
    proves="every evaluation was on the held-out samples of the data, and none of them is trained on",
    cannot="that no other run saw them",
)
def _held_out(subject: Subject) -> Iterator[str]:
    config, prepared, tokenizer = _prepared(subject)
    if common := set(_leaves(prepared.train_digests)) & set(_leaves(prepared.held_out_digests)):
        yield f"{len(common):,} held-out samples are trained on"
    questions = questions_of(config, list(prepared.held_out_samples), tokenizer)
    expected = samples_digest(prepared.held_out.ids, questions)
    for line in subject.history.evals:
        if line.samples != expected:
            yield f"step {line.step} was evaluated on other samples than those held out"


@rule(
    "data.batches",
    proves="every step saw the batch that data, seed and order make: the same digest, tokens and documents, so no "
    "batch was dropped, repeated or exchanged and no padding counts",
    cannot="that the weights learnt from it: replay is for that",
)
def _batches(subject: Subject) -> Iterator[str]:
    config, prepared, tokenizer = _prepared(subject)
    recorded: dict[int, list[StepLine]] = {}
    for placed in subject.history.all:
        if isinstance(placed.line, StepLine):
            recorded.setdefault(placed.line.step, []).append(placed.line)
    model = config.model.architecture() if subject.flops is None else subject.flops.model
    with PackedLoader(config.data, tokenizer, prepared=prepared) as loader:
        for step in range(1, max(recorded, default=0) + 1):
            hasher, lengths = hashlib.sha256(), list[int]()
            for _ in range(config.train.rows_per_step):
                row = next(loader)
                assert row.digest is not None
                hasher.update(bytes.fromhex(row.digest))
                lengths += row.layout.document_lengths[: row.layout.num_documents]
            tokens, pairs = sum(lengths), Pairs.of(model, lengths)
            for line in recorded.get(step, []):
                if line.batch.digest != hasher.hexdigest():
                    made = hasher.hexdigest()
                    yield f"step {step}: batch {line.batch.digest[:12]}..., the data make {made[:12]}..."
                elif line.tokens.real != tokens:
                    yield f"step {step}: {line.tokens.real:,} real tokens, the data make {tokens:,}"
                elif any(getattr(pairs, name) != value for name, value in line.batch.pairs.model_dump().items()):
                    yield f"step {step}: its query-key pairs are not those of its documents"


def _export(subject: Subject) -> tuple[Path, EventLine]:
    events = subject.history.events("export")
    if subject.run is None or not (subject.run / "export").is_dir():
        raise NotCheckableError("no exported weights are at hand: give the folder of the run with --run")
    if not events:
        raise NotCheckableError("the ledger speaks of no export")
    return subject.run / "export", events[-1]


def _sizes(first: dict[str, object], second: dict[str, object]) -> bool:
    """Whether a number differs; what words the export adds for other programs does not count."""
    numbers = {k for k in first.keys() & second.keys() if isinstance(first[k], int | list)}
    return any(first[k] != second[k] for k in numbers)


def _config(subject: Subject) -> RunConfig:
    if subject.run is None or not subject.with_data:
        raise NotCheckableError("the data were not looked at: give the folder of the run with --run, and --data")
    return load_config(RunFolder(subject.run))


@lru_cache(maxsize=1)
def _prepared(subject: Subject) -> tuple[RunConfig, Prepared, Tokenizer]:
    config = _config(subject)
    assert subject.run is not None
    try:
        tokenizer = load_tokenizer(RunFolder(subject.run).tokenizer)
        return config, prepare(config.data, tokenizer), tokenizer
    except (DataError, CheckpointError) as error:
        raise NotCheckableError(str(error)) from None


def _leaves(digests: bytes) -> list[bytes]:
    return [digests[i : i + _DIGEST_BYTES] for i in range(0, len(digests), _DIGEST_BYTES)]
