"""SHA-256 of every byte that a checkpoint writes, computed as it is written and again as it is read.

torch.distributed.checkpoint stores no digest of its content: a flipped bit in a shard loads without a word.
The writer here is its own, with a stream that hashes what passes through. hashlib gives up the interpreter's
lock, so hashing runs beside training, and reading hashes several files at a time.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fullweight.core.config import Config
from fullweight.core.crash import crash_point

_BLOCK_BYTES = 4 << 20


class FileDigest(Config):
    """Size and SHA-256 (hexadecimal) of a file."""

    size_bytes: int
    sha256: str


def digest(path: Path, *, from_device: bool = False) -> FileDigest:
    """Read a file and hash it. `from_device` first drops what the kernel remembers of it (after an fsync)."""
    hasher, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        if from_device and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := stream.readinto(block):
            hasher.update(block[:count])
            size += count
    return FileDigest(size_bytes=size, sha256=hasher.hexdigest())


def digests(paths: Iterable[Path], threads: int, *, from_device: bool = False) -> dict[str, FileDigest | OSError]:
    """`digest` of each path by file name, several at a time; an unreadable file gives its error."""

    def read(path: Path) -> tuple[str, FileDigest | OSError]:
        try:
            return path.name, digest(path, from_device=from_device)
        except OSError as error:
            return path.name, error

    with ThreadPoolExecutor(max_workers=threads) as pool:
        return dict(pool.map(read, paths))


class _HashingStream(io.RawIOBase):
    """A file open for writing that hashes what passes through."""

    def __init__(self, path: Path) -> None:
        self._file, self._hasher, self._size = path.open("wb"), hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hasher.update(view)
        self._size += view.nbytes
        crash_point("save.shard")
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self._file.flush()  # what is about to be synced must have left this process
        return self._file.fileno()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            super().close()

    def digest(self) -> FileDigest:
        return FileDigest(size_bytes=self._size, sha256=self._hasher.hexdigest())


class _HashingFileSystem(FileSystem):
    """Local files; `written` has the digest of each file written through it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, FileDigest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        with _HashingStream(path) as hashing:
            yield hashing
        self.written[path.name] = hashing.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class HashingWriter(dcp.FileSystemWriter):
    """Writes one rank's shards into `threads` files side by side, synced to disk; `written` says what."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, sync_files=True, overwrite=False)
        self.fs = self._hashing = _HashingFileSystem()
        self._threads = threads

    @property
    def written(self) -> dict[str, FileDigest]:
        """Digest of every file that this rank wrote, by name."""
        return self._hashing.written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One call of the base class for each file: its own extra threads fail without telling anybody."""

        def write(number: int, items: list[WriteItem]) -> list[WriteResult]:
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            try:
                return super(HashingWriter, self).write_data(part, planner).value()
            except RuntimeError as error:
                raise _disk_error(error) or error from None

        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            parts = [pool.submit(write, *part) for part in enumerate(_split(plan.items, self._threads))]
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for part in parts for result in part.result()])
        return results


def _disk_error(error: BaseException | None) -> OSError | None:
    """The disk's error behind another, if there is one.

    torch.save closes its archive after a failed write, which fails too and raises a RuntimeError of its own; sent
    to another rank, that would lose its context.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _split(items: list[WriteItem], parts: int) -> list[list[WriteItem]]:
    """`items` in so many lists of about equal bytes; the largest first, each to the shortest list."""
    lists, loads = [list[WriteItem]() for _ in range(parts)], [0] * parts
    for item in sorted(items, key=_size_bytes, reverse=True):
        least = loads.index(min(loads))
        lists[least].append(item)
        loads[least] += _size_bytes(item)
    return lists


def _size_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
