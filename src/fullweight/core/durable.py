"""What has to be on the disk before something else may name it.

A file's content and the folder entry that leads to it reach the disk on their own schedules. After a power cut a
renamed file may be empty, and a file in a renamed folder gone, unless each was synced before the rename and the
folder above after it.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything under a folder to the disk, and the folder itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def rename(path: Path, name: Path) -> None:
    """Give a synced file or folder its name, replacing a file, and force that to the disk."""
    os.replace(path, name)
    sync(name.parent)
    if path.parent != name.parent:
        sync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Write a file beside its place, on the disk before it gets its name; a reader never meets half of it."""
    beside = temporary(path)
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    rename(beside, path)


def temporary(path: Path) -> Path:
    """Where `write` writes a file before it has its name; a kill may leave it there."""
    return path.with_name(f".{path.name}.tmp")
