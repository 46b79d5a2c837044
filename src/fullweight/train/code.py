"""Which code runs: commit, what differs from it, and a digest that needs no git.

`source_sha256` is over the package's own files, so two machines can tell whether they run the same code however it
came there. Left out: the packages that it imports, which the record names with their versions.
"""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parents[1]
_SUFFIXES = {".cpp", ".h", ".html", ".json", ".py", ".toml"}


def commit() -> dict[str, Any]:
    """Commit of the code's own source tree, and whether files differ from it. A tree outside git has None."""
    try:
        found = _git("rev-parse", "HEAD").decode().strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": found, "uncommitted_changes": bool(changed.strip())}


@cache
def identity() -> dict[str, Any]:
    """Commit, SHA-256 of the difference to it (None when there is none, or no git), and of the source files."""
    try:
        found: str | None = _git("rev-parse", "HEAD").decode().strip()
        difference = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", ".")
    except (OSError, subprocess.SubprocessError):
        found, difference = None, b""
    diff_sha256 = hashlib.sha256(difference).hexdigest() if difference else None
    return {"commit": found, "diff_sha256": diff_sha256, "source_sha256": source_sha256(_HERE)}


def source_sha256(folder: Path) -> str:
    """Over the lines that `sha256sum` prints for the source files under `folder`, in order of paths."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and "__pycache__" not in p.parts)
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(_HERE), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
