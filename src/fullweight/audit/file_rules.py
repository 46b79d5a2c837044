"""Rules about what the ledger speaks of: stated figures, evaluations, checkpoints.

A bundle holds the manifest of every generation that was there when it was sealed. It names the ledger up to the
save by length and SHA-256, so a ledger that was made anew contradicts it; the generation itself, in the folder of
the run, contradicts a manifest that was made anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fullweight.audit.claims import agrees
from fullweight.audit.rule import NotCheckableError, rule
from fullweight.audit.subject import KeptCheckpoint, Subject
from fullweight.checkpoint.manifest import Generation, Manifest, verify
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.strict_json import parse_strict
from fullweight.evidence.bundle import EVALUATION, PERFORMANCE, RefusedError, open_plain
from fullweight.evidence.lines import EventLine, History, begins
from fullweight.evidence.performance import performance
from fullweight.evidence.state_root import stored_root

_SHARD = re.compile(r"__(\d+)_[\d_]+\.distcp")


@rule(
    "performance.recomputed",
    proves="every figure of performance.json follows from the lines of the ledger",
)
def _performance(subject: Subject) -> Iterator[str]:
    expected = performance(subject.history, subject.flops)
    for name in sorted(expected.keys() | subject.performance.keys()):
        stated, found = subject.performance.get(name), expected.get(name)
        if not agrees(stated, found):
            yield f"{PERFORMANCE}: {name} is stated as {_short(stated)}, the ledger makes {_short(found)}"


@rule("evaluation.recomputed", proves="evaluation.json holds what the ledger recorded at each evaluation")
def _evaluation(subject: Subject) -> Iterator[str]:
    expected = evaluations(subject.history)
    stated = subject.evaluation
    if not isinstance(stated, list) or len(stated) != len(expected):
        yield f"{EVALUATION} holds other evaluations than the ledger, which has {len(expected)}"
        return
    for row, found in zip(stated, expected, strict=True):
        if not agrees(row, found):
            yield f"{EVALUATION}: step {found['step']} is stated as {_short(row)}, the ledger has {_short(found)}"


@rule(
    "evaluation.answers",
    proves="the score of every evaluation is the share of right answers among those that are kept",
    cannot="that the model gave those answers: weights and replay are for that",
)
def _answers(subject: Subject) -> Iterator[str]:
    looked = False
    for line in subject.history.evals:
        name = f"samples/step-{line.step}.json"
        if name not in subject.bundle.listed:
            continue
        rows = subject.bundle.read_json(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise RefusedError("bundle.json", f"{name} holds no list of answers")
        looked = True
        marks = [row["correct"] for row in rows if isinstance(row.get("correct"), bool)]
        score = sum(marks) / len(marks) if marks else None
        if not agrees(line.score, score) or line.num_scored != len(marks):
            yield f"{name}: {sum(marks)} of {len(marks)} answers are right, the ledger has score {line.score}"
    if not looked:
        raise NotCheckableError("the bundle keeps no answers")


@rule(
    "evaluation.samples",
    proves="every evaluation was on the same held-out samples",
)
def _samples(subject: Subject) -> Iterator[str]:
    evals = subject.history.evals
    if not evals:
        raise NotCheckableError("there is no evaluation")
    for line in evals:
        if line.samples != evals[0].samples:
            yield f"step {line.step} was evaluated on other samples than step {evals[0].step}"


@rule(
    "checkpoint.manifests",
    proves="every checkpoint that is kept has the digest that the ledger recorded when it was written, and is of "
    "that step, model and configuration",
)
def _manifests(subject: Subject) -> Iterator[str]:
    for entry, manifest, sha256 in _kept(subject):
        if sha256 != entry.manifest_sha256:
            yield f"{entry.name} has SHA-256 {sha256[:12]}..., {entry.manifest_sha256[:12]}... was written"
        elif manifest.facts.step != entry.step:
            yield f"{entry.name} is of step {manifest.facts.step}, the ledger says {entry.step}"
        elif manifest.facts.model != subject.model:
            yield f"{entry.name} is of another model"


@rule(
    "checkpoint.ledger",
    proves="every checkpoint was written under this ledger: the lines up to its save have the length and SHA-256 "
    "that it names, so it is of this run and those lines are the ones that were there",
    cannot="a checkpoint that was rebuilt to name a new ledger: a signature, and replay, are for that",
)
def _checkpoint_ledger(subject: Subject) -> Iterator[str]:
    places = {placed.end: placed.sha256_so_far.hex() for placed in subject.history.all}
    for entry, manifest, _ in _kept(subject):
        head = manifest.facts.ledger
        if head is None:
            yield f"{entry.name} names no ledger"
        elif places.get(head.size_bytes) != head.sha256:
            yield (
                f"{entry.name} was written after {head.num_lines} lines of {head.size_bytes:,} bytes with another "
                "content: it is of another run, or lines before it were changed"
            )


@rule(
    "checkpoint.ranks",
    proves="every rank of the run has its part in every checkpoint",
)
def _ranks(subject: Subject) -> Iterator[str]:
    sizes = _ranks_by_generation(subject)
    for entry, manifest, _ in _kept(subject):
        ranks = manifest.facts.world.get("ranks")
        expected = sizes.get((entry.name, entry.manifest_sha256), subject.manifest.layout.ranks)
        if ranks != expected:
            yield f"{entry.name} was written by {str(ranks)[:20]} rank(s), the run had {expected}"
            continue
        there = {int(found[1]) for name in manifest.files if (found := _SHARD.fullmatch(name))}
        if missing := sorted(set(range(expected)) - there):
            yield f"{entry.name} holds nothing of rank {missing[0]} (of {expected})"


@rule(
    "checkpoint.bytes",
    proves="every byte of every checkpoint that is at hand is the one that was written when the ledger says so",
)
def _bytes(subject: Subject) -> Iterator[str]:
    for entry, path in _at_hand(subject):
        problem, generation = _verified(path)
        if generation is None:
            yield f"{entry.name}: {problem}"
        elif generation.sha256 != entry.manifest_sha256:
            found = generation.sha256
            yield f"{entry.name} has SHA-256 {found[:12]}..., {entry.manifest_sha256[:12]}... was written"


@rule(
    "checkpoint.roots",
    proves="the Merkle root over all weights, moments, random states and the place in the data of every "
    "checkpoint at hand is the one that is stated",
)
def _roots(subject: Subject) -> Iterator[str]:
    looked = False
    for entry, path in _at_hand(subject):
        _, generation = _verified(path)
        if entry.state_root is None or generation is None:
            continue
        looked = True
        try:
            found = stored_root(generation).root
        except CheckpointError as error:
            yield f"{entry.name}: {error}"
            continue
        if found != entry.state_root:
            yield f"{entry.name} has the root {found[:12]}..., {entry.state_root[:12]}... is stated"
    if not looked:
        raise NotCheckableError("no intact checkpoint at hand has a stated root")


def evaluations(history: History) -> list[dict[str, Any]]:
    """What `evaluation.json` holds: every evaluation that stands."""
    keys = ("step", "loss", "total_loss", "score", "num_scored", "samples")
    return [{key: getattr(line, key) for key in keys} for line in history.evals]


def _kept(subject: Subject) -> Iterator[tuple[KeptCheckpoint, Manifest, str]]:
    """Every generation whose manifest is in the bundle, with that manifest and its digest."""
    kept = [entry for entry in subject.checkpoints if entry.kept]
    if not kept:
        raise NotCheckableError("the bundle keeps the manifest of no checkpoint")
    for entry in kept:
        name = f"checkpoints/{entry.name}/manifest.json"
        if name not in subject.bundle.listed:
            raise RefusedError("bundle.complete", f"checkpoints.json calls {entry.name} kept, {name} is not there")
        with open_plain(subject.bundle.root / name) as stream:
            text = stream.read()
        try:
            manifest = Manifest.resolve(parse_strict(text), name)
        except (ValueError, ConfigError) as error:
            raise RefusedError("bundle.json", f"{name}: {error}") from None
        yield entry, manifest, hashlib.sha256(text).hexdigest()


def _at_hand(subject: Subject) -> list[tuple[KeptCheckpoint, Path]]:
    if not (found := subject.at_hand()):
        raise NotCheckableError("no checkpoint is at hand: give the folder of the run with --run")
    return found


def _verified(path: Path) -> tuple[str, Generation | None]:
    try:
        return "", verify(path)
    except CheckpointError as error:
        return str(error), None


def _ranks_by_generation(subject: Subject) -> dict[tuple[str, str], int]:
    """How many ranks wrote each generation, by what the ledger says of the next resume from it."""
    found = {}
    for placed in subject.history.all:
        line = placed.line
        if isinstance(line, EventLine) and begins(line) and isinstance(line.get("written_by_ranks"), int):
            key = (str(line.get("generation")), str(line.get("manifest_sha256")))
            found[key] = line.get("written_by_ranks")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "..."
