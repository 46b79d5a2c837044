"""The bundle as a research object: `ro-crate-metadata.json` by RO-Crate 1.1, plain JSON-LD.

So that archives and catalogues know what the files are: the root data set, one entity a file with size, type and
SHA-256, the run as an action that made them, and the program as its instrument. It repeats what the bundle says
and adds no claim. Source: https://www.researchobject.org/ro-crate/1.1/ (root data set, data entities, provenance).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fullweight.audit.subject import Claim
from fullweight.evidence.bundle import CRATE, LIST, digest
from fullweight.evidence.lines import History

_CONTEXT = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "https://schema.org/sha256"}]
_TYPES = {".json": "application/json", ".jsonl": "application/jsonl"}
_PROGRAM = "#fullweight"


def crate(root: Path, history: History, run: str, claims: Sequence[Claim]) -> dict[str, Any]:
    """The metadata file of a bundle in folder `root`, all of whose other files are there but for its list."""
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
                "license": "not stated",
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
            *files,
        ],
    }


def _file(path: Path, name: str) -> dict[str, Any]:
    size, sha256 = digest(path)
    entity = {"@id": name, "@type": "File", "name": name, "contentSize": str(size), "sha256": sha256}
    kind = _TYPES.get(path.suffix)
    return {**entity, "encodingFormat": kind} if kind else entity


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
