"""What a run began with, fixed before its first step: code, configuration, machine, data, first weights.

`manifest.json` is written once and never changed; the ledger's first line holds its SHA-256, so the two stand or
fall together. What changes later (another machine, another commit, more steps) is in the ledger's `resume` events.

Data files are known by size and SHA-256, and all of them by one Merkle root (`merkle.py`) over the lines
"<sha256> <size> <name>" in order of names; what was made of them by the roots over the digests of the samples that
are trained on, and of those held out, in the order in which they were read. Imports no torch.

Left out: that the machine is what it says. That takes somebody who looks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fullweight.core import durable
from fullweight.core.config import Config
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.evidence import ledger, merkle

FORMAT = 1
NAME = "manifest.json"


class DataFile(Config):
    """One file that samples were read from."""

    name: str  # as the recipe has it; of a folder, with the path inside it
    size_bytes: int
    sha256: str


class Source(Config):
    """One source of samples that is no file: generated, or opened by `datasets` from elsewhere."""

    name: str
    identity: dict[str, Any]  # seed and settings with the generator's digest; or fingerprint


class Samples(Config):
    """Samples of one side of the split: their number and the root over their content digests."""

    number: int
    merkle_root: str


class Data(Config):
    """What is trained on and what is held out."""

    files: tuple[DataFile, ...]
    merkle_root: str  # over the files
    sources: tuple[Source, ...]
    tokenizer_sha256: str
    identity: str  # of the rows that the loader makes: content, tokenizer, packing, seed
    train: Samples
    held_out: Samples


class RunManifest(Config):
    """The content of `manifest.json`."""

    format: Literal[1] = 1
    run: str  # random: no two runs share it
    written_at: str  # UTC
    code: dict[str, Any]  # commit, diff_sha256, source_sha256, packages
    config: dict[str, Any]  # resolved, without the folder
    config_sha256: str  # as in checkpoints
    model: dict[str, Any]  # published form
    parameters: dict[str, int]  # total, trained
    environment: dict[str, Any]  # as in environment.json
    layout: dict[str, Any]  # ranks, axes, and how many ranks run on which chip
    seeds: dict[str, int]
    threads_per_rank: int
    data: Data
    initial: dict[str, Any]  # where the first weights come from
    peak: dict[str, Any]
    flops_convention: str
    mlperf: dict[str, Any]  # the same under the names of MLPerf's logging, where it has one


def files_root(files: Sequence[DataFile]) -> str:
    """The Merkle root over data files, whatever order they come in."""
    ordered = sorted(files, key=lambda file: file.name)
    return merkle.root(f"{f.sha256} {f.size_bytes} {f.name}".encode() for f in ordered)


def config_sha256(config: dict[str, Any]) -> str:
    """Digest of a configuration, however its keys are ordered."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write(path: Path, manifest: RunManifest) -> None:
    """Write it, on the disk before it has its name."""
    durable.write(path, manifest.to_json().encode())


def sha256(path: Path) -> str:
    """Digest of the file, which the ledger's first line holds. Raises CheckpointError when there is none."""
    return hashlib.sha256(_content(path)).hexdigest()


def read(path: Path) -> RunManifest:
    """The manifest of a run. Raises CheckpointError when it is absent or not one."""
    content = _content(path)
    try:
        return RunManifest.resolve(parse_json(content), str(path))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be understood: {error}") from None


def require_bound(path: Path, lines: Path) -> None:
    """Raise CheckpointError unless the first line of the ledger names this very manifest."""
    found, first = sha256(path), next(ledger.read_all(lines), None)
    expected = None if first is None else first.entry.get("manifest_sha256")
    if found != expected:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:12]}..., and the first line of {lines.name} says "
            f"{'nothing of it' if expected is None else f'{str(expected)[:12]}...'}; restore the run's own"
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a run writes it before its first step; restore it") from None
