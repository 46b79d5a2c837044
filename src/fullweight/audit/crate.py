"""The bundle as a research object: `ro-crate-metadata.json` by RO-Crate 1.1, plain JSON-LD.

So that archives and catalogues know what the files are: the root data set, one entity a file with size, type and
SHA-256, the run as an action that made them, and the program as its instrument. It repeats what the bundle says
and adds no claim. A licence is the owner's to give, and RO-Crate wants one said: without `--license` the crate
says that none was stated. `packed` makes the one file that archives take; whoever checks it unpacks it first.
Source: https://www.researchobject.org/ro-crate/1.1/ (root data set, data and contextual entities, provenance).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from fullweight.audit.subject import Claim
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.evidence.bundle import CRATE, LIST, digest
from fullweight.evidence.lines import History

_CONTEXT = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "https://schema.org/sha256"}]
_TYPES = {".json": "application/json", ".jsonl": "application/jsonl"}
_PROGRAM = "#fullweight"


def spdx(expression: str) -> str:
    """A licence expression as SPDX spells it. Raises ConfigError on one that is none."""
    try:
        return canonicalize_license_expression(expression)
    except InvalidLicenseExpression as error:
        raise ConfigError(
            f"{error}: give an SPDX expression such as CC-BY-4.0 or 'MIT OR Apache-2.0' (https://spdx.org/licenses)"
        ) from None


def crate(root: Path, history: History, run: str, claims: Sequence[Claim], licence: str | None) -> dict[str, Any]:
    """The metadata file of a bundle in folder `root`, all of whose other files are there but for its list.

    `licence` is an SPDX expression, None where the owner states none.
    """
    terms = _licence(licence)
    files = [
        _file(path, path.relative_to(root).as_posix())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (LIST, CRATE)
    ]
    files.append({"@id": LIST, "@type": "File", "name": LIST, "encodingFormat": "application/json"})
    parts = [{"@id": one["@id"]} for one in files]
    began, ended = (_utc(placed.line.time) for placed in (history.all[0], history.all[-1]))
    return {
        "@context": _CONTEXT,
        "@graph": [
            {
                "@id": CRATE,
                "@type": "CreativeWork",
                "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
                "about": {"@id": "./"},
            },
            {
                "@id": "./",
                "@type": "Dataset",
                "name": f"Evidence of training run {run}",
                "description": "; ".join(
                    f"{c.statement}: {c.value} ({c.status})" for c in claims if c.value is not None
                ),
                "datePublished": datetime.now(UTC).date().isoformat(),
                "license": {"@id": terms["@id"]},
                "hasPart": parts,
                "mentions": {"@id": "#run"},
            },
            {
                "@id": "#run",
                "@type": "CreateAction",
                "name": f"Training run {run}",
                "instrument": {"@id": _PROGRAM},
                "result": parts,
                "startTime": began,
                "endTime": ended,
            },
            {
                "@id": _PROGRAM,
                "@type": "SoftwareApplication",
                "name": "Fullweight",
                "version": metadata.version("fullweight"),
            },
            terms,
            *files,
        ],
    }


def packed(root: Path, target: Path) -> Path:
    """The sealed crate in folder `root` as one ZIP file, its metadata at the top. Raises CheckpointError."""
    making = target.with_name(f".{target.name}.packing")
    try:
        with zipfile.ZipFile(making, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(root).as_posix())
        making.replace(target)
    except OSError as error:
        making.unlink(missing_ok=True)
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; the bundle is in {root}"
        ) from None
    return target


def _licence(expression: str | None) -> dict[str, Any]:
    """The contextual entity that the root data set links to."""
    if expression is None:
        told = (
            "Whoever sealed these files stated no licence for them: ask before you use them for more than a check."
        )
        return {"@id": "#licence", "@type": "CreativeWork", "name": "no licence stated", "description": told}
    page = "#licence" if " " in expression else f"https://spdx.org/licenses/{expression}"
    told = f"SPDX licence expression {expression}"
    return {
        "@id": page,
        "@type": "CreativeWork",
        "name": expression,
        "identifier": expression,
        "description": told,
    }


def _file(path: Path, name: str) -> dict[str, Any]:
    size, sha256 = digest(path)
    entity = {"@id": name, "@type": "File", "name": name, "contentSize": str(size), "sha256": sha256}
    kind = _TYPES.get(path.suffix)
    return {**entity, "encodingFormat": kind} if kind else entity


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
