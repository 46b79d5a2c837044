"""What one saved generation consists of, and the proof that a folder still is that.

A generation is a folder with the shards of torch.distributed.checkpoint, `manifest.json` and
`manifest.sha256`. The manifest lists every other file with size and SHA-256, and says what the state is of: step,
model, configuration, ranks, position in the data, head of the ledger. `manifest.sha256` is the digest of the
manifest in the format of `sha256sum`, so the whole can be checked without this program. A `Generation` is
obtained only from `verify`, and only a `Generation` can be loaded.

Left out: who wrote it. A digest shows that content is unchanged, not whose it is; that takes a signature.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fullweight.checkpoint.hashing import FileDigest, digests
from fullweight.checkpoint.peers import Peers
from fullweight.core import durable
from fullweight.core.config import Config
from fullweight.core.crash import crash_point
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.ledger_head import LedgerHead
from fullweight.core.strict_json import parse_json

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
"""Folder of a generation: its step, and a number from 2 on when a step was saved again."""


class CorruptError(CheckpointError):
    """A generation is not what was written."""


class Facts(Config):
    """What the saved state is of, beside its tensors."""

    step: int
    model: dict[str, Any]  # the architecture, published form
    config: dict[str, Any]  # the resolved configuration
    world: dict[str, Any]  # number of ranks and size of each mesh axis
    position: dict[str, Any]  # host state that is the same on all ranks: place in the data, counters
    ledger: LedgerHead | None = None
    source: str | None = None  # digest of the source's form that is kept with the run
    versions: dict[str, str | None]

    @property
    def config_sha256(self) -> str:
        """Digest of the configuration, however its keys are ordered."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()


class Manifest(Config):
    """The content of `manifest.json`."""

    format: Literal[1] = 1
    generation: str  # name of the folder
    save_id: str  # random: no two saves share it
    previous: str | None  # digest of the manifest that `latest` named before
    written_at: str  # UTC
    config_sha256: str
    facts: Facts
    files: dict[str, FileDigest]

    @property
    def size_bytes(self) -> int:
        """All files that the manifest lists."""
        return sum(f.size_bytes for f in self.files.values())


@dataclass(frozen=True)
class Generation:
    """A folder whose every byte agreed with its manifest when `verify` made this."""

    path: Path
    manifest: Manifest
    sha256: str  # of manifest.json

    @property
    def step(self) -> int:
        return self.manifest.facts.step


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write manifest and seal into `folder`, on the disk; returns the manifest's digest."""
    text = manifest.to_json().encode()
    found = hashlib.sha256(text).hexdigest()
    durable.write(folder / MANIFEST, text)
    durable.write(folder / SEAL, _seal(found))
    return found


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of a generation and its digest, with the seal and the folder's name checked, no file read.

    Raises CorruptError.
    """
    try:
        text, seal = (path / MANIFEST).read_bytes(), (path / SEAL).read_bytes()
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise CorruptError(f"{path}: {name} is missing, so nothing says what was written") from None
    except OSError as error:
        raise CorruptError(f"{path}: {Path(error.filename).name} cannot be read: {error.strerror}") from None
    found = hashlib.sha256(text).hexdigest()
    if seal != _seal(found):
        raise CorruptError(f"{path}: {MANIFEST} has SHA-256 {found[:12]}..., which is not what {SEAL} says")
    try:
        manifest = Manifest.resolve(parse_json(text), str(path / MANIFEST))
    except (ValueError, ConfigError) as error:
        raise CorruptError(f"{path}: {MANIFEST} cannot be understood: {error}") from None
    if NAME.fullmatch(path.name) and manifest.generation != path.name:
        raise CorruptError(
            f"{path}: {MANIFEST} is stale: it was written for {manifest.generation}, this is {path.name}"
        )
    return manifest, found


def verify(path: Path, peers: Peers | None = None) -> Generation:
    """Check every byte of a generation; the ranks of `peers` share the files and all get the verdict.

    Raises CorruptError naming the file and what is wrong with it.
    """
    peers = peers or Peers()
    crash_point("load.verify")
    manifest, found = peers.on_main(lambda: read_manifest(path))
    problems = peers.on_main(lambda: _differences_in_names(path, manifest))
    if not problems:
        mine = _share(manifest.files, peers.rank, peers.size)
        own = _differences_in_content(path, manifest, mine, peers.num_threads)
        problems = [problem for part in peers.gather(own) for problem in part]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CorruptError(f"{path}: {sorted(problems)[0]}{more}")
    return Generation(path, manifest, found)


def _seal(sha256: str) -> bytes:
    return f"{sha256}  {MANIFEST}\n".encode()


def _differences_in_names(path: Path, manifest: Manifest) -> list[str]:
    """Files that are missing, that do not belong, or that have another size."""
    there = {p.name: p for p in path.iterdir()}
    problems = [f"{name} is missing" for name in manifest.files.keys() - there.keys()]
    extra = there.keys() - manifest.files.keys() - {MANIFEST, SEAL}
    problems += [f"{name} does not belong: the manifest does not list it" for name in extra]
    for name, expected in manifest.files.items():
        if name in there and (size := there[name].stat().st_size) != expected.size_bytes:
            problems.append(f"{name} has {size:,} bytes, {expected.size_bytes:,} were written")
    return problems


def _differences_in_content(path: Path, manifest: Manifest, names: Iterable[str], threads: int) -> list[str]:
    problems = []
    for name, found in digests((path / name for name in names), threads).items():
        expected = manifest.files[name]
        if isinstance(found, OSError):
            problems.append(f"{name} cannot be read: {found.strerror}")
        elif found != expected:
            problems.append(
                f"{name} has SHA-256 {found.sha256[:12]}..., {expected.sha256[:12]}... was written"
                f"{_origin(path, found)}"
            )
    return problems


def _origin(path: Path, found: FileDigest) -> str:
    """Where else that content was written: a swapped shard or a mixed generation, told as such."""
    for folder in [path, *sorted(p for p in path.parent.iterdir() if NAME.fullmatch(p.name) and p != path)]:
        try:
            listed = read_manifest(folder)[0].files
        except CorruptError:
            continue
        for name, known in listed.items():
            if known == found:
                return f": it is {name} of {folder.name}"
    return ""


def _share(files: dict[str, FileDigest], rank: int, size: int) -> list[str]:
    """The files that a rank hashes: largest first, each to the rank with the least so far."""
    loads, shares = [0] * size, [list[str]() for _ in range(size)]
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += entry.size_bytes
    return shares[rank]
