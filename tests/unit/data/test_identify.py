"""Data are known file by file; what is no file by what makes it; a change while it is read is found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from fullweight.core.errors import DataError
from fullweight.data.identify import Identifying, identify
from fullweight.data.loader import DataConfig


def config(*sources: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig.resolve({"sources": list(sources), "row_tokens": 64, **more}, "test")


def lines(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_files_by_content(tmp_path: Path) -> None:
    """Each once, though both sides of the split read it; every file of a folder."""
    one = lines(tmp_path / "a.jsonl", "x")
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list([{"text": "y"}]).save_to_disk(folder)
    source = {"kind": "file", "path": one, "columns": {"text": "text"}}
    found = identify(config(source, {"kind": "file", "path": str(folder)}, held_out=[source]))
    assert found.others == ()
    there = [tmp_path / "a.jsonl", *sorted(p for p in folder.iterdir())]
    assert [f.name for f in found.files] == [str(p) for p in there]
    assert [f.sha256 for f in found.files] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in there]
    assert [f.size_bytes for f in found.files] == [p.stat().st_size for p in there]


def test_generated_tasks_by_seed_and_generator() -> None:
    synth = {"kind": "synth", "synth": {"seed": 5, "num_samples": 10}}
    [(name, identity)] = identify(config(synth)).others
    assert name == "synth (seed 5)"
    assert (identity["seed"], identity["num_samples"]) == (5, 10)
    assert len(identity["generator_sha256"]) == 64


def test_a_data_set_from_elsewhere_by_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = datasets.Dataset.from_list([{"text": "y"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: fetched)
    [(name, identity)] = identify(config({"kind": "file", "path": "somebody/set", "split": "test"})).others
    assert name == "somebody/set"
    assert identity["fingerprint"] == fetched._fingerprint
    assert identity["split"] == "test"


def test_a_file_that_changes_meanwhile_is_found(tmp_path: Path) -> None:
    """Longer, or as long with another time."""
    path = Path(lines(tmp_path / "a.jsonl", "x"))
    settings = config({"kind": "file", "path": str(path), "columns": {"text": "text"}})
    for change in (lambda: os.utime(path, ns=(1, 1)), lambda: lines(path, "x", "y")):
        with Identifying(settings) as identifying:
            assert identifying.result().files[0].name == str(path)
            change()
            with pytest.raises(DataError, match="changed while it was being read"):
                identifying.result()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = Path(lines(tmp_path / "a.jsonl", "x"))
    with Identifying(config({"kind": "file", "path": str(path), "columns": {"text": "text"}})) as identifying:
        identifying.result()
        path.unlink()
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read"):
            identifying.result()
