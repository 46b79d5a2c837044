"""The evidence bundle: a folder of plain files, opened as something that a stranger made to do harm.

`bundle.json` lists every other file with size and SHA-256; `bundle.sig`, when there is one, signs all of them.
What each file holds is in docs/evidence.md. Opening reads names first, and refuses whatever is not a plain file of
this folder; then it reads text within bounds. Nothing in a bundle is ever run, imported or unpickled, and nothing
is written. A refusal names its rule; what can be read is judged by `rules.py`.

Left out: archives. A bundle is packed and unpacked by whatever tool its owner trusts. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullweight.core.errors import FullweightError
from fullweight.core.strict_json import parse_strict

FORMAT = 1
LIST, SIGNATURE = "bundle.json", "bundle.sig"
MANIFEST, LEDGER, CONFIG, MODEL = "manifest.json", "ledger.jsonl", "config.json", "model.json"
COVERAGE, PERFORMANCE, EVALUATION = "coverage.json", "performance.json", "evaluation.json"
CHECKPOINTS, CLAIMS, CRATE = "checkpoints.json", "claims.json", "ro-crate-metadata.json"
NEEDED = (MANIFEST, LEDGER, CONFIG, MODEL, PERFORMANCE, EVALUATION, CHECKPOINTS, CLAIMS)

MOST_FILES, MOST_LEVELS = 100_000, 6
MOST_JSON_BYTES = 256 * 2**20
MOST_LINE_BYTES = 8 * 2**20
MOST_LEDGER_BYTES = 2 * 2**30
_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
_READ_BYTES = 2**20

_T = TypeVar("_T", bound=BaseModel)


REFUSALS = {
    "bundle.folder": "what is given is no folder",
    "bundle.version": "a format that is unknown here",
    "bundle.complete": "a file is missing, not listed or cut short",
    "bundle.paths": "a name that leaves the folder, or is no plain name",
    "bundle.plain-files": "a link, pipe or device in the place of a file",
    "bundle.hard-links": "a file that has another name elsewhere",
    "bundle.size": "more files, levels or bytes than a bundle has",
    "bundle.line-length": "a line beyond 8 MiB, which is not read to its end",
    "bundle.json": "text that is no strict JSON (UTF-8; no NaN, no key twice, no endless number or nesting), or "
    "another shape than the file has",
    "bundle.signature": "a signature file that is none",
    "ledger.shape": "a line of the ledger that lacks what its kind has, or holds what no run comes near",
}
"""Why a bundle is not looked at any further, by name."""


class RefusedError(FullweightError):
    """The bundle is not looked at any further; `rule` is the stable name of the reason (`REFUSALS`)."""

    def __init__(self, rule: str, reason: str) -> None:
        assert rule in REFUSALS, rule
        super().__init__(f"{rule}: {reason}")
        self.rule, self.reason = rule, reason


class Stated(BaseModel):
    """What a bundle states: typed and frozen; keys of a later minor version are let through."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class ListedFile(Stated):
    """One file of the bundle, by its path with forward slashes."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LedgerEnd(Stated):
    """Where the ledger ended when it was sealed; `head` is the SHA-256 of its last line."""

    lines: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    head: str = Field(pattern=r"^[0-9a-f]{64}$")


class Listing(Stated):
    """The content of `bundle.json`."""

    format: Literal[1] = 1
    run: str
    sealed_at: str  # UTC
    made_by: str
    finished: bool
    ledger: LedgerEnd
    files: list[ListedFile]


@dataclass(frozen=True)
class Bundle:
    """A folder whose names are safe and whose list agrees with what is there; its content may still be wrong."""

    root: Path
    listing: Listing

    @property
    def listed(self) -> dict[str, ListedFile]:
        return {f.path: f for f in self.listing.files}

    def read_json(self, name: str) -> Any:
        """The value of a JSON file; raises RefusedError."""
        return read_json(self.root, name)

    def hash_problems(self) -> list[str]:
        """Files whose bytes are not those that `bundle.json` lists."""
        problems = []
        for name, expected in sorted(self.listed.items()):
            size, found = digest(self.root / name)
            if size != expected.size_bytes:
                problems.append(f"{name} has {size:,} bytes, {LIST} lists {expected.size_bytes:,}")
            elif found != expected.sha256:
                problems.append(f"{name} has SHA-256 {found[:12]}..., {LIST} lists {expected.sha256[:12]}...")
        return problems


def open_bundle(root: Path) -> Bundle:
    """Look at a folder as a bundle; raises RefusedError naming the rule that it breaks."""
    if not root.is_dir():
        raise RefusedError("bundle.folder", f"{root} is no folder; give the folder that `fullweight seal` wrote")
    found = _names(root)
    if LIST not in found:
        raise RefusedError(
            "bundle.complete", f"{root} has no {LIST}; give the folder that `fullweight seal` wrote"
        )
    values = read_json(root, LIST)
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise RefusedError(
            "bundle.version",
            f"format {str(version)[:40]} is unknown here, expected {FORMAT}; use the version that made it",
        )
    listing = stated(Listing, values, LIST)
    names = [f.path for f in listing.files]
    for name in names:
        _require_inside(name)
    if len(set(names)) != len(names):
        raise RefusedError("bundle.json", f"{LIST} lists a file twice")
    _require_complete(set(names), found)
    return Bundle(root, listing)


def read_json(root: Path, name: str) -> Any:
    """The value of a JSON file of a folder; raises RefusedError."""
    with open_plain(root / name) as stream:
        text = stream.read(MOST_JSON_BYTES + 1)
    if len(text) > MOST_JSON_BYTES:
        raise RefusedError("bundle.size", f"{name} has more than {MOST_JSON_BYTES:,} bytes")
    try:
        return parse_strict(text)
    except ValueError as error:
        raise RefusedError("bundle.json", f"{name}: {error}") from None


def read_object(root: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a bundle or a run folder, empty where there is none; raises RefusedError."""
    if not (root / name).is_file():
        return {}
    value = read_json(root, name)
    if not isinstance(value, dict):
        raise RefusedError("bundle.json", f"{name} holds no object")
    return value


def stated(kind: type[_T], values: Any, where: str, rule: str = "bundle.json") -> _T:
    """`values` as `kind`; raises RefusedError naming the first key that is absent or of another type."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:100] or "its top level"
        raise RefusedError(rule, f"{where}: {key}: {first['msg']}") from None


def bounded_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a stream without their ends, never holding more than one, nor one of any length.

    Raises RefusedError on a line or a total beyond the bounds, and on a last line that was cut short.
    """
    total = number = 0
    while line := stream.readline(MOST_LINE_BYTES + 1):
        number, total = number + 1, total + len(line)
        if len(line) > MOST_LINE_BYTES:
            raise RefusedError("bundle.line-length", f"{name}:{number} has more than {MOST_LINE_BYTES:,} bytes")
        if not line.endswith(b"\n"):
            raise RefusedError("bundle.complete", f"{name} ends within line {number}: it was cut short")
        if total > MOST_LEDGER_BYTES:
            raise RefusedError("bundle.size", f"{name} has more than {MOST_LEDGER_BYTES:,} bytes")
        yield line[:-1]


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading, never following a link nor waiting for a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError("bundle.plain-files", f"{path.name} cannot be opened: {error.strerror}") from None
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise RefusedError("bundle.plain-files", f"{path.name} is no plain file")
    return stream


def _names(root: Path) -> dict[str, int]:
    """Size of every file below `root` by its path; only plain files and folders with plain names."""
    found: dict[str, int] = {}
    folders = [(root, "", 0)]
    while folders:
        folder, prefix, level = folders.pop()
        if level > MOST_LEVELS:
            raise RefusedError("bundle.size", f"folders are nested beyond {MOST_LEVELS} levels")
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if _NAME.fullmatch(entry.name) is None:
                    raise RefusedError("bundle.paths", f"{name[:100]!r} is no plain file name")
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    folders.append((Path(entry.path), f"{name}/", level + 1))
                    continue
                if not stat.S_ISREG(facts.st_mode):
                    kind = "a symbolic link" if stat.S_ISLNK(facts.st_mode) else "no plain file"
                    raise RefusedError("bundle.plain-files", f"{name} is {kind}")
                if facts.st_nlink > 1:
                    raise RefusedError("bundle.hard-links", f"{name} has another name elsewhere; copy the bundle")
                found[name] = facts.st_size
                if len(found) > MOST_FILES:
                    raise RefusedError("bundle.size", f"there are more than {MOST_FILES:,} files")
    return found


def _require_inside(name: str) -> None:
    parts = PurePosixPath(name).parts
    plain = all(_NAME.fullmatch(p) and p not in (".", "..") for p in parts)
    if not parts or not plain or "/".join(parts) != name or name in (LIST, SIGNATURE):
        raise RefusedError("bundle.paths", f"{LIST} lists {name[:100]!r}, which is no path inside the bundle")


def _require_complete(listed: set[str], found: dict[str, int]) -> None:
    for name in sorted((listed | set(NEEDED)) - found.keys()):
        raise RefusedError("bundle.complete", f"{name} is not there")
    for name in sorted(set(NEEDED) - listed):
        raise RefusedError("bundle.complete", f"{LIST} does not list {name}")
    for name in sorted(found.keys() - listed - {LIST, SIGNATURE}):
        raise RefusedError("bundle.complete", f"{name} does not belong: {LIST} does not list it")


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a plain file."""
    hasher, size = hashlib.sha256(), 0
    with open_plain(path) as stream:
        while chunk := stream.read(_READ_BYTES):
            hasher.update(chunk)
            size += len(chunk)
    return size, hasher.hexdigest()
