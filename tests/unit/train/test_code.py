"""The code of a run is known by its commit, by what differs from it, and by its files."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from fullweight.train import code


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_source_files_as_sha256sum_prints_them(tmp_path: Path) -> None:
    """Other suffixes and caches do not count."""
    (tmp_path / "sub").mkdir()
    for name in ("b.py", "sub/a.toml", "notes.txt"):
        (tmp_path / name).write_text(name)
    listed = subprocess.run(
        ["sha256sum", "b.py", "sub/a.toml"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert code.source_sha256(tmp_path) == hashlib.sha256(listed).hexdigest()


def test_a_difference_to_the_commit_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None without one; as `git diff` says it with one; and all unknown outside git, but for the files."""
    monkeypatch.setattr(code, "_HERE", tmp_path)
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "a")
    clean = code.identity.__wrapped__()
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert clean["diff_sha256"] is None
    assert code.commit() == {"commit": clean["commit"], "uncommitted_changes": False}
    (tmp_path / "a.py").write_text("2\n")
    changed = code.identity.__wrapped__()
    difference = git(tmp_path, "diff", "HEAD", "--binary").encode()
    assert changed["diff_sha256"] == hashlib.sha256(difference).hexdigest()
    assert changed["source_sha256"] != clean["source_sha256"]
    monkeypatch.setenv("PATH", "")
    assert code.identity.__wrapped__() == changed | {"commit": None, "diff_sha256": None}
