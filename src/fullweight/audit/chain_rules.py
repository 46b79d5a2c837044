"""Rules about what was written when: files, chain, times, steps, segments, and where the ledger ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise

from fullweight.audit.rule import NotCheckableError, rule
from fullweight.audit.subject import Subject, segment_configs
from fullweight.evidence.bundle import CONFIG, MANIFEST, MODEL, open_plain
from fullweight.evidence.ledger import GENESIS
from fullweight.evidence.lines import EventLine, Placed, StepLine, begins
from fullweight.evidence.performance import set_back

LEDGER_FORMAT = 2
_SIGNED_BY_SEGMENTS = ("start", "resume")


@rule(
    "bundle.hashes",
    proves="every file has the size and SHA-256 that bundle.json lists",
    cannot="who made the list: that takes a signature",
)
def _hashes(subject: Subject) -> Iterator[str]:
    yield from subject.bundle.hash_problems()


@rule(
    "ledger.chain",
    proves="every line of the ledger names the SHA-256 of the line before it: none was changed, removed or moved",
    cannot="a chain that was made anew from the changed line on: signature, checkpoints and replay are for that",
)
def _chain(subject: Subject) -> Iterator[str]:
    before = GENESIS
    for placed in subject.history.all:
        if placed.line.previous != before:
            yield (
                f"{_at(placed)}: it follows a line with SHA-256 {placed.line.previous[:12]}..., the line before "
                f"it has {before[:12]}...: a line was changed, removed or moved"
            )
        before = placed.sha256


@rule(
    "ledger.end",
    proves="the ledger ends with the line that it ended with when it was sealed",
    cannot="what was done before the first line or after the seal",
)
def _end(subject: Subject) -> Iterator[str]:
    stated, history = subject.bundle.listing.ledger, subject.history
    found = len(history.all)
    if (found, history.all[-1].end) != (stated.lines, stated.size_bytes):
        yield f"the ledger has {found:,} lines, it had {stated.lines:,} when it was sealed"
    elif history.head != stated.head:
        yield f"the last line has SHA-256 {history.head[:12]}..., it had {stated.head[:12]}... when it was sealed"


@rule("ledger.run", proves="bundle, manifest and ledger are of one run", cannot="")
def _run(subject: Subject) -> Iterator[str]:
    first = subject.history.all[0].line
    if not isinstance(first, EventLine) or first.what != "start":
        yield "ledger line 1 is not the event `start`"
        return
    if first.get("format") != LEDGER_FORMAT:
        yield f"ledger line 1 has format {str(first.get('format'))[:20]}, expected {LEDGER_FORMAT}"
    for where, name in (("ledger", first.get("run")), ("bundle", subject.bundle.listing.run)):
        if name != subject.manifest.run:
            yield f"the {where} is of run {str(name)[:40]}, the manifest of {subject.manifest.run[:40]}"


@rule(
    "manifest.bound",
    proves="the manifest is the one whose digest the first line of the ledger carries: it was fixed before step 1",
    cannot="when that was in the world's time: publish the digest, or have it time-stamped, before you train",
)
def _bound(subject: Subject) -> Iterator[str]:
    with open_plain(subject.bundle.root / MANIFEST) as stream:
        found = hashlib.sha256(stream.read()).hexdigest()
    for event in _beginnings(subject):
        line = event.line
        assert isinstance(line, EventLine)
        if line.what == "start" and line.get("manifest_sha256") != found:
            named = str(line.get("manifest_sha256"))
            yield f"{_at(event)} names a manifest with SHA-256 {named[:12]}..., this one has {found[:12]}..."


@rule(
    "manifest.config",
    proves="configuration and model are those of the manifest, and what resumes changed",
    cannot="",
)
def _config(subject: Subject) -> Iterator[str]:
    last = segment_configs(subject.manifest.config, subject.history)[-1]
    if differing := _differing(_flat(last), _flat({k: v for k, v in subject.config.items() if k != "output"})):
        yield f"{CONFIG} differs from the manifest in {', '.join(differing[:4])}"
    if subject.model != subject.manifest.model:
        differing = _differing(subject.manifest.model, subject.model)
        yield f"{MODEL} differs from the manifest in {', '.join(differing[:4])}"
    digest = (subject.manifest.model_extra or {}).get("config_sha256")
    own = hashlib.sha256(json.dumps(subject.manifest.config, sort_keys=True).encode()).hexdigest()
    if digest != own:
        yield f"{MANIFEST} says that its configuration has SHA-256 {str(digest)[:12]}..., it has {own[:12]}..."


@rule(
    "ledger.times",
    proves="the clock of the ledger never goes back within a segment, where one process reads the wall clock once "
    "and then a clock that cannot be set",
    cannot="a clock that was wrong all along",
)
def _times(subject: Subject) -> Iterator[str]:
    for before, placed in pairwise(subject.history.all):
        if placed.line.time < before.line.time and not begins(placed.line):
            back = before.line.time - placed.line.time
            yield f"{_at(placed)}: its time is {back:.3f} s before that of line {before.number}"


@rule(
    "ledger.wall-time",
    proves="nor does it go back between segments, so the time from the first line to the last is known",
    cannot="a clock that was set forward, or whose interruptions were called shorter",
)
def _wall_time(subject: Subject) -> Iterator[str]:
    if reason := set_back(subject.history):
        raise NotCheckableError(reason)
    yield from ()


@rule(
    "ledger.steps",
    proves="steps follow one another within every segment, and those that stand are 1, 2, 3, ... to the last",
    cannot="steps that were never written down",
)
def _steps(subject: Subject) -> Iterator[str]:
    expected = 1
    for placed in subject.history.all:
        if begins(placed.line):
            expected = placed.line.step + 1
        elif isinstance(placed.line, StepLine):
            if placed.line.step != expected:
                yield f"{_at(placed)}: step {placed.line.step} where step {expected} follows"
            expected = placed.line.step + 1


@rule(
    "ledger.segments",
    proves="every interruption is told: segments are numbered without a gap, and each goes back to a step that "
    "was reached, from the checkpoint that was written there",
    cannot="",
)
def _segments(subject: Subject) -> Iterator[str]:
    written: dict[str, str] = {}
    reached = 0
    for placed in subject.history.all:
        line = placed.line
        if isinstance(line, StepLine):
            reached = line.step
        if not isinstance(line, EventLine):
            continue
        if line.what == "checkpoint":
            written[str(line.get("generation"))] = str(line.get("manifest_sha256"))
        if not begins(line):
            continue
        if line.get("segment") != placed.segment:
            yield f"{_at(placed)}: segment {str(line.get('segment'))[:20]} where {placed.segment} follows"
        if line.what == "start":
            reached, written = 0, {}
            continue
        name, digest = str(line.get("generation")), str(line.get("manifest_sha256"))
        if placed.number == 1 or line.step > reached:
            yield f"{_at(placed)}: it goes on after step {line.step}, and step {reached} was the last before it"
        elif written.get(name, digest) != digest:
            yield (
                f"{_at(placed)}: it goes on from {name} with SHA-256 {digest[:12]}..., "
                f"{written[name][:12]}... was written"
            )
        reached = line.step


@rule(
    "ledger.finish",
    proves="a run that is called finished made every step of its configuration, and says so last",
    cannot="",
)
def _finish(subject: Subject) -> Iterator[str]:
    history, wanted = subject.history, subject.settings[-1].train.num_steps
    finishes = history.events("finish")
    if not subject.bundle.listing.finished:
        if finishes:
            yield "the ledger says that the run finished, bundle.json that it did not"
        return
    if history.last_step != wanted:
        yield f"the last step is {history.last_step}, the configuration has {wanted}"
    if not finishes or history.all[-1].line is not finishes[-1]:
        yield "the last line is not the event `finish`: the end of the ledger is missing, or the run went on"


@rule(
    "ledger.covers-files",
    proves="no file of the bundle speaks of a step that the ledger does not have",
    cannot="",
)
def _covers(subject: Subject) -> Iterator[str]:
    last = subject.history.last_step
    events = _checkpoint_events(subject)
    known = {(str(e.get("generation")), str(e.get("manifest_sha256"))): e.step for e in events}
    for entry in subject.checkpoints:
        step = known.get((entry.name, entry.manifest_sha256))
        if step is None:
            yield f"checkpoints.json has {entry.name}, of which the ledger has no line with its digest"
        elif step != entry.step:
            yield f"checkpoints.json says that {entry.name} is of step {entry.step}, the ledger says {step}"
    for name in subject.bundle.listed:
        folder, _, file = name.partition("/")
        number = file.removeprefix("step-").removesuffix(".json")
        if folder == "samples" and (not number.isdecimal() or int(number) > last):
            yield f"{name} is of no step of the ledger, whose last is {last}"
    recorded = {str(e.get("generation")) for e in subject.history.events("checkpoint")}
    for name in sorted(recorded - {entry.name for entry in subject.checkpoints}):
        yield f"the ledger has a checkpoint {name[:40]}, checkpoints.json has none"


def _checkpoint_events(subject: Subject) -> list[EventLine]:
    return subject.history.events("checkpoint", superseded=True)


def _beginnings(subject: Subject) -> list[Placed]:
    return [p for p in subject.history.all if begins(p.line)]


def _at(placed: Placed) -> str:
    return f"ledger line {placed.number} (step {placed.line.step})"


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _differing(first: dict[str, object], second: dict[str, object]) -> list[str]:
    absent = object()
    keys = sorted(first.keys() | second.keys())
    return [key for key in keys if first.get(key, absent) != second.get(key, absent)]
