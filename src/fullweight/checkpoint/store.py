"""Writing and reading one generation of training state.

torch.distributed.checkpoint plans who writes and reads what, on any number of ranks. Added here: every file is
hashed as it is written and read back from the disk before the generation gets its name, the ranks agree on success
at each stage, and reading starts only from a `Generation`, whose bytes were all verified. See `manifest.py` for
what a generation is and `generations.py` for the folder around it.

Left out: host state other than tensors; it is in the manifest's facts.
"""

from __future__ import annotations

import errno
import math
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fullweight.checkpoint import generations
from fullweight.checkpoint.hashing import FileDigest, HashingWriter, digests
from fullweight.checkpoint.manifest import CorruptError, Facts, Generation, Manifest, write_manifest
from fullweight.checkpoint.metadata import PlanReader
from fullweight.checkpoint.peers import Peers
from fullweight.core import durable
from fullweight.core.crash import crash_point
from fullweight.core.errors import CheckpointError
from fullweight.core.tensors import local_part

State = Mapping[str, Tensor]
"""Tensors by name: DTensors for what is sharded, plain ones, equal wherever they are held, for what is not."""

_FILE_BYTES = 256 << 20  # a rank writes one file up to this size, then more, for hashing side by side
_METADATA_ALLOWANCE = 1.02
_BATCH_BYTES = 256 << 20  # read at a time by a stream


@dataclass(frozen=True)
class Saved:
    """A generation that is on disk, read back and named by `latest`."""

    path: Path
    sha256: str  # of its manifest
    size_bytes: int
    seconds: float
    removed: tuple[str, ...]  # older generations that went


@dataclass(frozen=True)
class Stored:
    """What a generation holds under a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save(
    folder: Path,
    state: State,
    facts: Facts,
    *,
    keep: int | None = None,
    peers: Peers | None = None,
    before: Callable[[], None] | None = None,
) -> Saved:
    """Write `state` as a new generation under `folder`; all ranks of `peers` together, each its own shards.

    `before` runs first, on rank 0: it puts on the disk what the state relies on.
    `keep` removes all but that many newest generations once the new one is verified and named. Raises
    CheckpointError when the disk refuses or returns other bytes than were written; earlier generations stay.
    """
    peers, began = peers or Peers(), time.perf_counter()
    crash_point("save.begin")
    with _disk_errors(f"could not write a checkpoint of step {facts.step} in {folder}"):
        if before is not None:
            peers.on_main(before)
        name = peers.on_main(lambda: _begin(folder, facts.step))
        writing = folder / f"{generations.WRITING}{name}"
        try:
            peers.together(lambda: _check_room(folder, state, peers))
            written = _write_shards(writing, state, peers)
            peers.together(lambda: _read_back(writing, written, peers))
            crash_point("save.manifest")
            files = {file: entry for part in peers.gather(written) for file, entry in part.items()}
            if not peers.is_main:
                crash_point("save.rename")
                crash_point("save.pointer")
            sha256 = peers.on_main(lambda: _commit(folder, name, facts, files))
        except (Exception, CheckpointException):  # the library's own is no Exception
            if peers.is_main:
                shutil.rmtree(writing, ignore_errors=True)
            raise
    removed = peers.on_main(lambda: _retain(folder, keep, folder / name))
    size = sum(entry.size_bytes for entry in files.values())
    return Saved(folder / name, sha256, size, time.perf_counter() - began, removed)


def load(
    generation: Generation, state: State, *, complete: Iterable[str] = ("model",), peers: Peers | None = None
) -> None:
    """Fill the tensors of `state` in place from a verified generation; their names and shapes are expected there.

    For each first part of a name in `complete`, the generation must hold no tensors that no rank asks for. Raises
    CheckpointError, before anything is written into a tensor, when names, shapes or dtypes differ.
    """
    peers = peers or Peers()
    # stages of a pipeline hold different tensors
    everywhere = frozenset(name for names in peers.gather(list(state)) for name in names)
    peers.together(lambda: _check_tensors(generation, state, everywhere, frozenset(complete)))
    crash_point("load.read")
    _read(generation, state, peers)


def contents(generation: Generation) -> dict[str, Stored]:
    """Name, shape and dtype of every tensor of a generation, read from its plan alone."""
    entries = PlanReader(generation.path).read_metadata().state_dict_metadata
    return {
        name: Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def stream(generation: Generation, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a verified generation by name, whole, in the order asked for, in this process alone.

    No more are held than fit into 256 MB, or one that is larger.
    """
    held = contents(generation)
    for batch in _batches(names, held):
        tensors = {name: torch.empty(held[name].shape, dtype=held[name].dtype) for name in batch}
        _read(generation, tensors, None)
        yield from tensors.items()


def local_bytes(state: State) -> int:
    """Bytes of this rank's part of `state`."""
    return sum(local.numel() * local.element_size() for local in map(local_part, state.values()))


def _read(generation: Generation, state: State, peers: Peers | None) -> None:
    """Fill the tensors of `state`; without peers, this process does it alone, whoever else there is."""
    try:
        dcp.load(
            dict(state),
            storage_reader=PlanReader(generation.path),
            process_group=None if peers is None else peers.group,
            no_dist=peers is None or not dist.is_initialized(),
        )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{generation.path} was verified and then could not be read: {cause}") from None


def _batches(names: Iterable[str], held: Mapping[str, Stored]) -> Iterator[list[str]]:
    batch: list[str] = []
    room = _BATCH_BYTES
    for name in names:
        size = math.prod(held[name].shape) * held[name].dtype.itemsize
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(name)
        room -= size
    if batch:
        yield batch


def _begin(folder: Path, step: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    durable.sync(folder.parent)
    name = generations.new_name(folder, step)
    writing = folder / f"{generations.WRITING}{name}"
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir()
    return name


def _check_room(folder: Path, state: State, peers: Peers) -> None:
    """Half a checkpoint on a full disk helps nobody and takes the last bytes from the ledger."""
    plain = {
        name: local_bytes({name: tensor}) for name, tensor in state.items() if not isinstance(tensor, DTensor)
    }
    everywhere: dict[str, int] = {}  # stages of a pipeline hold different ones
    for part in peers.gather(plain):
        everywhere |= part
    sharded = sum(peers.gather(local_bytes(state) - sum(plain.values())))
    needed = int((sharded + sum(everywhere.values())) * _METADATA_ALLOWANCE)
    free = free_bytes(folder)
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free")


def free_bytes(folder: Path) -> int:
    """Room that the disk of `folder` has for this user."""
    return shutil.disk_usage(folder).free


def _write_shards(writing: Path, state: State, peers: Peers) -> dict[str, FileDigest]:
    threads = min(peers.num_threads, math.ceil(local_bytes(state) / _FILE_BYTES) or 1)
    writer = HashingWriter(writing, threads)
    alone = not dist.is_initialized()
    dcp.save(dict(state), storage_writer=writer, process_group=peers.group, no_dist=alone)
    return writer.written


def _read_back(writing: Path, written: dict[str, FileDigest], peers: Peers) -> None:
    paths = [writing / name for name in written]
    for name, found in digests(paths, peers.num_threads, from_device=True).items():
        if isinstance(found, OSError):
            raise found
        if found != written[name]:
            raise OSError(errno.EIO, f"the disk returns other bytes than were written to {name}")


def _commit(folder: Path, name: str, facts: Facts, files: dict[str, FileDigest]) -> str:
    """Manifest, seal, name, pointer, in this order, each on disk before the next; the manifest's digest."""
    writing = folder / f"{generations.WRITING}{name}"
    try:
        pointer = generations.read_pointer(folder)
    except CorruptError:
        pointer = None  # about to be replaced
    manifest = Manifest(
        generation=name,
        save_id=uuid.uuid4().hex,
        previous=pointer and pointer[1],
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config_sha256=facts.config_sha256,
        facts=facts,
        files=dict(sorted(files.items())),
    )
    sha256 = write_manifest(writing, manifest)
    temporary = generations.write_pointer(folder, name, sha256)
    crash_point("save.rename")
    durable.rename(writing, folder / name)
    generations.move_pointer(folder, temporary)
    return sha256


def _retain(folder: Path, keep: int | None, good: Path) -> tuple[str, ...]:
    """Remove what is beyond `keep`; a disk that refuses a removal has not harmed the new generation."""
    removed = []
    for path in [] if keep is None else generations.removable(folder, keep, good):
        try:
            generations.remove(path)
        except OSError as error:
            warnings.warn(f"old checkpoint {path} could not be removed: {error}", stacklevel=2)
        else:
            removed.append(path.name)
    return tuple(removed)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """A refusal of the disk becomes one CheckpointError."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        reason = _disk_refusal(error)
        if reason is None:
            raise
        raise CheckpointError(f"{what}: {reason}") from None


def _disk_refusal(error: BaseException) -> str | None:
    """What the disk said on the first rank where it did, or None when a failure is not the disk's."""
    if isinstance(error, CheckpointException):
        reasons = [_disk_refusal(cause) for cause, _ in error.failures.values()]
        return None if None in reasons else reasons[0]
    return str(error) if isinstance(error, OSError) else None


def _check_tensors(
    generation: Generation, expected: State, everywhere: frozenset[str], complete: frozenset[str]
) -> None:
    path, stored = generation.path, contents(generation)
    fix = "resume with the configuration that wrote it"
    for name, tensor in expected.items():
        found = stored.get(name)
        if found is None:
            raise CheckpointError(f"{path} holds no {name}: it is a checkpoint of another model; {fix}")
        if found.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(found.shape)}, this model expects {list(tensor.shape)}; {fix}"
            )
        if found.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: {name} is {found.dtype}, this model expects {tensor.dtype}; {fix}")
    left = sorted(name for name in stored.keys() - everywhere if name.partition(".")[0] in complete)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"{path} holds {left[0]}{more}, which this model does not have; {fix}")


# A single process is meant to save alone; the library warns of it every time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
