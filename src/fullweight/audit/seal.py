"""Make the evidence bundle of a run: gather its files, compute its figures, state its claims, sign.

The bundle is made beside its place and renamed at the end. What is claimed is first verified here, as a stranger
would: a claim whose rules do not all hold is sealed as unverified, one of which the run kept nothing as
unsupported. Raw files are copied as they are; the ledger without the torn end that a kill may have left.

Left out: weights, unless asked for, and training data (their digests are in the manifest).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fullweight.audit import verify as _verify  # noqa: F401  (fills RULES)
from fullweight.audit.claims import sealed_claims
from fullweight.audit.crate import crate, spdx
from fullweight.audit.file_rules import evaluations
from fullweight.audit.rule import RULES, Finding, apply
from fullweight.audit.signing import Signer, sign
from fullweight.audit.subject import Claim, KeptCheckpoint, open_subject
from fullweight.checkpoint.manifest import MANIFEST as GENERATION_MANIFEST
from fullweight.checkpoint.manifest import verify as verify_generation
from fullweight.core.errors import ConfigError
from fullweight.core.strict_json import parse_strict
from fullweight.evidence.bundle import (
    CHECKPOINTS,
    CLAIMS,
    CONFIG,
    COVERAGE,
    CRATE,
    EVALUATION,
    LEDGER,
    LIST,
    MANIFEST,
    MODEL,
    PERFORMANCE,
    LedgerEnd,
    ListedFile,
    Listing,
    digest,
    open_plain,
)
from fullweight.evidence.lines import History, read_history
from fullweight.evidence.performance import FlopsRule, performance
from fullweight.evidence.state_root import stored_root


@dataclass(frozen=True)
class SealedBundle:
    """What was sealed."""

    root: Path
    claims: tuple[Claim, ...]
    findings: tuple[Finding, ...]
    signed: bool


def seal(
    run: Path,
    out: Path,
    *,
    signer: Signer | None = None,
    with_checkpoints: bool = False,
    ro_crate: bool = False,
    licence: str | None = None,
) -> SealedBundle:
    """Write the bundle of the run in folder `run` to the new folder `out`; unsigned without a signer.

    `licence` is the SPDX expression that the RO-Crate states. Raises FullweightError when the run lacks something,
    and RefusedError when its ledger cannot be read.
    """
    licence = None if licence is None else spdx(licence)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another --out")
    for name in (MANIFEST, LEDGER, CONFIG, MODEL):
        if not (run / name).is_file():
            raise ConfigError(f"{run} has no {name}; give the folder of a run that this version recorded")
    making = out.with_name(f".{out.name}.sealing")
    if making.exists():
        shutil.rmtree(making)
    try:
        making.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make {out}: {error.strerror}; choose another --out") from None
    try:
        made = _make(run, making, with_checkpoints, ro_crate, licence)
        if signer is not None:
            sign(making, signer)
        if out.exists():
            out.rmdir()
        making.rename(out)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return SealedBundle(out, made[0], made[1], signer is not None)


def _make(
    run: Path, root: Path, with_checkpoints: bool, ro_crate: bool, licence: str | None
) -> tuple[tuple[Claim, ...], tuple[Finding, ...]]:
    _copy(run, root)
    if with_checkpoints and (run / "tokenizer").is_dir():  # a replay goes on with the very tokenizer
        shutil.copytree(run / "tokenizer", root / "tokenizer")
    with open_plain(root / LEDGER) as stream:
        history = read_history(stream)
    manifest = parse_strict((root / MANIFEST).read_bytes())
    flops = FlopsRule.of(parse_strict((root / MODEL).read_bytes()), manifest.get("config", {}))
    _write(root / PERFORMANCE, performance(history, flops))
    _write(root / EVALUATION, evaluations(history))
    _write(root / CHECKPOINTS, [c.model_dump() for c in _checkpoints(run, root, history, with_checkpoints)])
    _write(root / CLAIMS, [])
    _list(root, history, str(manifest.get("run")))
    subject = open_subject(root, run)
    findings = apply(RULES, subject)
    claims = sealed_claims(subject, findings)
    _write(root / CLAIMS, [claim.model_dump() for claim in claims])
    if ro_crate:
        _write(root / CRATE, crate(root, history, str(manifest.get("run")), claims, licence))
    _list(root, history, str(manifest.get("run")))
    return tuple(claims), tuple(findings)


def _copy(run: Path, root: Path) -> None:
    for name in (MANIFEST, CONFIG, MODEL, COVERAGE):
        if (run / name).is_file():
            shutil.copyfile(run / name, root / name)
    with (run / LEDGER).open("rb") as source, (root / LEDGER).open("wb") as target:
        for line in source:  # written by this program, in lines of bounded length
            if line.endswith(b"\n"):
                target.write(line)
    (root / "samples").mkdir()
    for path in sorted((run / "samples").glob("step-*.json")):
        shutil.copyfile(path, root / "samples" / path.name)


def _checkpoints(run: Path, root: Path, history: History, whole: bool) -> Iterator[KeptCheckpoint]:
    """Every generation that the ledger says was written to the end; the manifest, or all, of those still there."""
    seen = set()
    for event in history.events("checkpoint", superseded=True):
        name, sha256 = str(event.get("generation")), str(event.get("manifest_sha256"))
        if (name, sha256) in seen:
            continue
        seen.add((name, sha256))
        path = run / "checkpoints" / name
        generation = verify_generation(path) if (path / GENERATION_MANIFEST).is_file() else None
        if (
            generation is None or generation.sha256 != sha256
        ):  # removed, and its name perhaps taken by a later save
            yield KeptCheckpoint(name=name, step=event.step, manifest_sha256=sha256, state_root=None, kept=False)
            continue
        target = root / "checkpoints" / name
        if whole:
            shutil.copytree(path, target)
        else:
            target.mkdir(parents=True)
            shutil.copyfile(path / GENERATION_MANIFEST, target / GENERATION_MANIFEST)
        found = stored_root(generation).root
        yield KeptCheckpoint(name=name, step=event.step, manifest_sha256=sha256, state_root=found, kept=True)


def _list(root: Path, history: History, run: str) -> None:
    """Write `bundle.json` over what is there."""
    files = []
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != LIST):
        size, sha256 = digest(path)
        files.append(ListedFile(path=path.relative_to(root).as_posix(), size_bytes=size, sha256=sha256))
    listing = Listing(
        run=run,
        sealed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        made_by=f"fullweight {metadata.version('fullweight')}",
        finished=bool(history.events("finish")),
        ledger=LedgerEnd(lines=len(history.all), size_bytes=history.all[-1].end, head=history.head),
        files=files,
    )
    _write(root / LIST, listing.model_dump())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
