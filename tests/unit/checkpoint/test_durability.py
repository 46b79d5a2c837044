"""After a power cut nothing is named that is not on the disk: the order of fsync and rename, seen as it happens.

The system calls are watched in this process: each fsync with what the file held then, each rename with what was
on the disk at that time. A file counts as on the disk when it has not changed since its last fsync.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.unit.checkpoint.saved import facts, save, state

from fullweight.checkpoint import generations, store
from fullweight.checkpoint.export import new_folder
from fullweight.checkpoint.generations import POINTER, WRITING
from fullweight.core import durable
from fullweight.evidence import ledger
from fullweight.evidence.ledger import Ledger
from fullweight.train.run_folder import write_json


@dataclass
class Watched:
    """Renames in order, as (from, to, what of it was not on the disk, folders with unsynced entries)."""

    renames: list[tuple[Path, Path, list[str]]] = field(default_factory=list)
    unsynced_entries: list[set[Path]] = field(default_factory=list)  # before each rename
    _synced: dict[tuple[int, int], tuple[int, int, tuple[str, ...]]] = field(default_factory=dict)
    _dirty: set[Path] = field(default_factory=set)  # folders in which a name was moved and not synced

    def fsync(self, descriptor: int) -> None:
        self._synced[_key(os.fstat(descriptor))] = _content(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self._dirty.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def rename(self, source: Path, target: Path) -> None:
        inside = [source, *source.rglob("*")] if source.is_dir() else [source]
        late = [str(p) for p in inside if self._synced.get(_key(p.stat())) != _content(p)]
        self.unsynced_entries.append(set(self._dirty))
        self.renames.append((source, target, late))
        self._dirty |= {source.parent, target.parent}

    def assert_on_disk(self, path: Path) -> None:
        assert self._synced.get(_key(path.stat())) == _content(path), f"{path} is not on the disk as it is"

    def assert_all_on_disk(self) -> None:
        assert self.renames
        for source, target, late in self.renames:
            assert late == [], f"{source} became {target} before {late} was on the disk"
        assert self._dirty == set(), "names moved and not forced to the disk"


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _content(path: Path) -> tuple[int, int, tuple[str, ...]]:
    found = path.stat()
    if path.is_dir():
        return 0, 0, tuple(sorted(os.listdir(path)))
    return found.st_size, found.st_mtime_ns, ()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watch_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.fsync(descriptor)

    def watch(original: Any) -> Any:
        def renamed(source: Any, target: Any) -> None:
            seen.rename(Path(source).absolute(), Path(target).absolute())
            original(source, target)

        return renamed

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch(rename))
    monkeypatch.setattr(os, "replace", watch(replace))
    return seen


def test_a_generation_is_on_the_disk_before_it_is_named(tmp_path: Path, watched: Watched) -> None:
    """Shards, plan, manifest, seal and the folder's entries; then its name; then the pointer, and each entry."""
    folder = tmp_path / "checkpoints"
    path = store.save(folder, state(), facts(1)).path
    named = [(s.name, t.name) for s, t, _ in watched.renames]
    at = named.index((f"{WRITING}{path.name}", path.name))
    pointer = named.index((f".{POINTER}.tmp", POINTER))
    assert at < pointer
    assert folder not in watched.unsynced_entries[pointer], "the pointer moved before the name it tells"
    watched.assert_all_on_disk()


def test_what_is_removed_or_passed_over_loses_its_name_first(tmp_path: Path, watched: Watched) -> None:
    """Retention and `--on-corrupt previous` leave no folder entry to chance either."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    choice = generations.Choice(generations.verify(tmp_path / "step-2"), [generations.Refusal("step-3", "a test")])
    generations.set_aside(tmp_path, choice)
    last = watched.renames[-1]
    assert (last[1].name, last[2]) == (POINTER, [])
    assert tmp_path not in watched.unsynced_entries[-1]


def test_an_export_is_on_the_disk_before_it_is_named(tmp_path: Path, watched: Watched) -> None:
    """Files in folders inside it, too."""
    with new_folder(tmp_path / "export") as staging:
        (staging / "a").write_bytes(b"a" * 1000)
        (staging / "source" / "headers").mkdir(parents=True)
        (staging / "source" / "headers" / "b").write_bytes(b"b")
    watched.assert_all_on_disk()


def test_small_files_of_a_run(tmp_path: Path, watched: Watched) -> None:
    """JSON beside the run, a ledger whose torn end is cut off, and what the check itself would notice."""
    write_json(tmp_path / "config.json", {"a": 1})
    log = Ledger(tmp_path / "ledger.jsonl")
    for step in range(1, 5):
        log.append("step", step, {})
    log.close()
    with (tmp_path / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"kind":')
    ledger.mend(tmp_path / "ledger.jsonl")
    watched.assert_on_disk(tmp_path / "ledger.jsonl")
    watched.assert_all_on_disk()
    (tmp_path / "x").write_text("never synced")
    durable.rename(tmp_path / "x", tmp_path / "y")
    with pytest.raises(AssertionError, match=r"before .*x.* was on the disk"):
        watched.assert_all_on_disk()
