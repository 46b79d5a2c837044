"""The weights that a run began with, had again: drawn anew from seed and name, or read from where they came from.

Fresh weights are a function of seed, name and architecture alone (`models/deepseek_v4/init.py`), the same for any
number of ranks, as long as torch's generator is: a hash table, which is drawn like them and which no step changes,
must come out as the checkpoint holds it. Weights of a checkpoint folder count only if every byte is what
`import.json`, the receipt of the run's first reading, says. Where neither can be had there is a reason, and
nothing is guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fullweight.checkpoint.folder import PublishedFolder, row_chunks
from fullweight.checkpoint.hf import fill_slices
from fullweight.checkpoint.manifest import Facts
from fullweight.checkpoint.shards import as_bytes
from fullweight.checkpoint.slices import Slice
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import fill_part


class Reader(Protocol):
    """Gives whole tensors by our names."""

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """fp32, or int64 of a hash table."""


@dataclass(frozen=True)
class FirstWeights:
    """`reader` gives them; None where they cannot be had, for this `reason`. `proof` says why to trust them."""

    kind: Literal["fresh", "checkpoint"]
    reader: Reader | None
    proof: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Fresh:
    config: DeepSeekV4Config
    seed: int

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        tensors = _room(shapes)
        for name, shape in shapes.items():
            fill_part(name, tensors[name], (0,) * len(shape), shape, self.config, self.seed)
        return tensors


@dataclass(frozen=True)
class _Published:
    folder: PublishedFolder

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        tensors = _room(shapes)
        fill_slices(self.folder, {name: Slice.of(tensor) for name, tensor in tensors.items()})
        return tensors


@contextmanager
def first_weights(facts: Facts, receipt: Path, folder: Path | None = None) -> Iterator[FirstWeights]:
    """The first weights of the run that `facts` (of one of its checkpoints) are of.

    `receipt` is its import.json; `folder` is where model.checkpoint lies here, when not where the run had it.
    """
    named = facts.config["model"]["checkpoint"]
    if named is None:
        config = DeepSeekV4Config.from_published(facts.model)
        seed = int(facts.config["train"]["seed"])
        yield FirstWeights("fresh", _Fresh(config, seed), f"drawn again from seed {seed} and each tensor's name")
        return
    place = Path(named) if folder is None else folder
    try:
        opened = PublishedFolder(place)
    except (CheckpointError, ConfigError) as error:
        yield FirstWeights("checkpoint", None, reason=f"{error}; say where model.checkpoint lies with --initial")
        return
    with opened:
        try:
            count = check_receipt(opened, receipt)
        except CheckpointError as error:
            yield FirstWeights("checkpoint", None, reason=str(error))
            return
        proof = f"{count} tensors of {place} have the SHA-256 that {receipt.name} says"
        yield FirstWeights("checkpoint", _Published(opened), proof)


def check_receipt(folder: PublishedFolder, receipt: Path) -> int:
    """Hash every stored tensor that the receipt's run read and compare; returns how many.

    Raises CheckpointError naming one that is missing or another, or what is wrong with the receipt.
    """
    try:
        entries = {str(e["name"]): dict(e) for e in parse_json(receipt.read_bytes())["read"]}
    except OSError as error:
        raise CheckpointError(
            f"{receipt} cannot be read ({error.strerror}): nothing says which weights the run began with"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{receipt} is damaged: it is no list of the tensors that were read") from None
    checked = 0
    for name, entry in entries.items():
        parts = _parts(receipt, entry)
        if not parts:
            continue  # drafts and copies, which no run reads
        if name not in folder.files:
            raise CheckpointError(f"{folder.path} lacks {name}, which the run began with")
        for (start, stop), expected in parts.items():
            if _hash(folder, name, start, stop) != expected:
                raise CheckpointError(f"{folder.path}: {name} is not what the run began with ({receipt.name})")
        checked += 1
    lacking = {s for t in folder.catalogue.tensors.values() for s in t.stored_names()} - entries.keys()
    if lacking:
        raise CheckpointError(f"{receipt} does not list {min(lacking)}: it is of another checkpoint")
    return checked


def _parts(receipt: Path, entry: Mapping[str, Any]) -> dict[tuple[int, int], str]:
    """SHA-256 by the range of bytes that it is of."""
    try:
        return {(int(p["bytes"][0]), int(p["bytes"][1])): str(p["sha256"]) for p in entry["parts"]}
    except (KeyError, TypeError, IndexError, ValueError):
        raise CheckpointError(f"{receipt} is damaged: {entry.get('name')} has no list of parts") from None


def _hash(folder: PublishedFolder, name: str, start: int, stop: int) -> str | None:
    """SHA-256 of those bytes of a stored tensor; None where they are not whole rows of it."""
    entry = folder.catalogue.entries[name]
    if not entry.shape:
        return hashlib.sha256(as_bytes(folder.raw(name))).hexdigest()
    row = entry.row_bytes
    if not 0 <= start <= stop <= entry.num_bytes or start % row or stop % row:
        return None
    digest = hashlib.sha256()
    for first, last in row_chunks(entry.shape, start // row, stop // row):
        digest.update(as_bytes(folder.raw(name, first, last)))
    return digest.hexdigest()


def _room(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    dtypes = {name: torch.int64 if name.endswith("tid2eid") else torch.float32 for name in shapes}
    return {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
