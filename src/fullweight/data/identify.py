"""Which data a recipe names, file by file, so that a stranger can tell whether theirs are the same.

Files are hashed as they lie on the disk, those of a folder each; a generator is known by its settings and its own
code; what `datasets` fetches from elsewhere by the library's fingerprint. `Identifying` does it in a thread while
the same data are read and tokenised, and finds a file that changes meanwhile.

Left out: what was made of the data. The digests of samples say that (`tokenised.py`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fullweight.core.errors import DataError
from fullweight.data import synth
from fullweight.data.readers import fingerprint
from fullweight.data.sources import FileSource, SynthSource
from fullweight.data.tokenised import DataConfig

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class FoundFile:
    """One data file as it was when it was hashed."""

    name: str
    path: Path
    size_bytes: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class Identified:
    """Files, and (name, identity) of the sources that are none."""

    files: tuple[FoundFile, ...]
    others: tuple[tuple[str, dict[str, Any]], ...]


class Identifying:
    """Hash the data in the background; a context manager, whose end gives up what is not needed any more."""

    def __init__(self, config: DataConfig) -> None:
        self._given_up = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fullweight-identify")
        self._found: Future[Identified] = self._pool.submit(identify, config, self._given_up)

    def result(self) -> Identified:
        """Waits for it. Raises DataError when a file cannot be read or is not any more what was hashed."""
        found = self._found.result()
        for file in found.files:
            if _stamp(file.path) != (file.size_bytes, file.modified_ns):
                raise DataError(f"{file.path} changed while it was being read; start again when it is complete")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up.set()
        self._pool.shutdown()


def identify(config: DataConfig, given_up: threading.Event | None = None) -> Identified:
    """Hash every file of every source, each once; stops early when `given_up` is set. Raises DataError."""
    files: dict[str, FoundFile] = {}
    others: dict[str, dict[str, Any]] = {}
    for source in (*config.sources, *config.held_out):
        if isinstance(source, SynthSource):
            settings = source.synth.model_dump(mode="json")
            others[source.name] = {"kind": "synth", **settings, "generator_sha256": _generator()}
            continue
        listed = list(_files(source))
        if not listed:
            others[source.name] = {"kind": "datasets", **fingerprint(source.path, source.split)}
        for name, path in listed:
            if name not in files:
                files[name] = _hashed(name, path, given_up or threading.Event())
    return Identified(tuple(files.values()), tuple(others.items()))


def _files(source: FileSource) -> Iterator[tuple[str, Path]]:
    path = Path(source.path)
    if path.is_file():
        yield source.path, path
    elif path.is_dir():
        for inside in sorted(p for p in path.rglob("*") if p.is_file()):
            yield f"{source.path}/{inside.relative_to(path).as_posix()}", inside


def _hashed(name: str, path: Path, given_up: threading.Event) -> FoundFile:
    hasher, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    size, modified = _stamp(path)
    try:
        with path.open("rb", buffering=0) as stream:
            while (count := stream.readinto(block)) and not given_up.is_set():
                hasher.update(block[:count])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return FoundFile(name, path, size, modified, hasher.hexdigest())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _generator() -> str:
    """Digest of the generator's own code: other code may make other tasks of the same seed."""
    hasher = hashlib.sha256()
    for path in sorted(Path(synth.__file__).parent.glob("*.py")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()
