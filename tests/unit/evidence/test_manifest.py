"""A manifest is known by its digest, which the ledger begins with; data by roots that anybody can recompute."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.errors import CheckpointError
from fullweight.evidence import manifest
from fullweight.evidence.ledger import Ledger
from fullweight.evidence.manifest import DataFile, RunManifest

NOTHING = hashlib.sha256().hexdigest()
SAMPLES = {"number": 0, "merkle_root": NOTHING}


def values(**changes: Any) -> dict[str, Any]:
    """The least that a manifest says."""
    empty = (
        "code",
        "config",
        "model",
        "parameters",
        "environment",
        "layout",
        "seeds",
        "initial",
        "peak",
        "mlperf",
    )
    data = {"files": [], "merkle_root": NOTHING, "sources": [], "tokenizer_sha256": "", "identity": ""}
    data |= {"train": SAMPLES, "held_out": SAMPLES}
    found: dict[str, Any] = {name: {} for name in empty}
    found |= {"run": "a", "written_at": "2026-01-01T00:00:00+00:00", "config_sha256": "", "threads_per_rank": 1}
    return found | {"data": data, "flops_convention": ""} | changes


def file(name: str, content: bytes) -> DataFile:
    return DataFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_it_comes_back_and_keeps_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    written = RunManifest.resolve(values(seeds={"train": 3, "data": 4}), "test")
    manifest.write(path, written)
    assert manifest.read(path) == written
    assert manifest.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_root_of_files_by_hand() -> None:
    """Two files, in order of names whatever order they come in, with the prefixes of RFC 6962."""
    one, two = file("data/b.jsonl", b"1"), file("data/a.jsonl", b"22")
    leaves = [hashlib.sha256(b"\0" + f"{f.sha256} {f.size_bytes} {f.name}".encode()).digest() for f in (two, one)]
    expected = hashlib.sha256(b"\1" + b"".join(leaves)).hexdigest()
    assert manifest.files_root([one, two]) == manifest.files_root([two, one]) == expected
    assert manifest.files_root([one, file("data/a.jsonl", b"23")]) != expected


def test_another_manifest_is_refused(tmp_path: Path) -> None:
    """Changed by one letter, missing, or of a ledger that names none."""
    path, lines = tmp_path / "manifest.json", tmp_path / "ledger.jsonl"
    manifest.write(path, RunManifest.resolve(values(), "test"))
    log = Ledger(lines)
    log.begin("start", 0, {"manifest_sha256": manifest.sha256(path)})
    log.append("step", 1, {})
    log.close()
    manifest.require_bound(path, lines)
    path.write_text(path.read_text().replace('"run": "a"', '"run": "b"'))
    with pytest.raises(CheckpointError, match="restore the run's own"):
        manifest.require_bound(path, lines)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        manifest.require_bound(path, lines)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps(values(format=2)), json.dumps(values(more=1))])
def test_what_is_no_manifest_is_said(content: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be understood"):
        manifest.read(path)
