"""Training checkpoints: written beside, checked, then renamed into place.

A checkpoint is a folder `step-N` holding one torch.distributed.checkpoint (each rank writes its own shards)
and `complete.json`, which lists every file with its size. It is written as `.writing-step-N`, synced to disk
and renamed last, so a folder named `step-N` is whole whatever happened to the process. A reader checks the
sizes first and never loads a folder that disagrees.

Left out: content hashes and loading over another number of ranks' host state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fullweight.core.errors import CheckpointError

COMPLETE = "complete.json"
_NAME = re.compile(r"step-(\d+)")


def save(folder: Path, step: int, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write `state` (nested dicts of tensors, DTensors and picklable values) as `folder/step-N`.

    All ranks call it with their own shards. `keep` removes all but that many newest checkpoints, after the
    new one is whole. Raises CheckpointError when the disk refuses; what was there before stays.
    """
    final, writing = folder / f"step-{step}", folder / f".writing-step-{step}"
    if _is_main():
        shutil.rmtree(writing, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    _barrier()
    with _disk_errors(f"could not write checkpoint {final}", writing):
        with _quiet():
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(writing, sync_files=True),
                no_dist=not dist.is_initialized(),
            )
        if _is_main():
            _finish(writing, final, step)
    _barrier()
    if keep is not None and _is_main():
        for _, old in completed(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place from the checkpoint at `path`; its keys and shapes say what is expected.

    Raises CheckpointError when the folder is incomplete or damaged, or holds another model's tensors.
    """
    check(path)
    reader = dcp.FileSystemReader(path)
    _check_tensors(path, reader.read_metadata().state_dict_metadata, _flatten(state))
    try:
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"checkpoint {path} is damaged: {cause}; use an earlier checkpoint") from None


def completed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(m[1]), path) for m, path in named if m and (path / COMPLETE).is_file())


def latest(folder: Path) -> Path:
    """The newest whole checkpoint; raises CheckpointError when there is none."""
    found = completed(folder)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint in {folder}; start again with `fullweight train` and a new --output"
        )
    return found[-1][1]


def check(path: Path) -> None:
    """Compare the files of a checkpoint with its own list; raises CheckpointError on any difference."""
    try:
        listed = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {COMPLETE} is missing; use an earlier one"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path / COMPLETE} is damaged; use an earlier checkpoint") from None
    for name, size in listed.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {state}; use an earlier checkpoint")


def _finish(writing: Path, final: Path, step: int) -> None:
    files = {p.name: p.stat().st_size for p in sorted(writing.iterdir())}
    with (writing / COMPLETE).open("w", encoding="utf-8") as stream:
        json.dump({"step": step, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    if final.exists():  # a resumed run reached this step again
        shutil.rmtree(final)
    writing.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(what: str, unfinished: Path) -> Iterator[None]:
    """A refusal of the disk becomes one CheckpointError, and the unfinished folder goes."""
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = _disk_refusal(error)
        if reason is None:
            raise
        if _is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{what}: {reason}; free some space and `fullweight resume` the run") from None


def _disk_refusal(error: BaseException) -> str | None:
    """What the disk said, or None when the failure is not the disk's.

    torch.save closes its archive after a failed write and then raises a RuntimeError of its own, whose
    context is the disk's error; sent between ranks, an exception loses its context.
    """
    if isinstance(error, CheckpointException):
        reasons = [_disk_refusal(cause) for cause, _ in error.failures.values()]
        return None if None in reasons else reasons[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__context__
    return "the disk refused a write" if "inline_container" in str(error) else None


def _flatten(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _check_tensors(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        shape = getattr(value, "shape", None)
        entry = stored.get(name)
        if shape is None or (entry is not None and not isinstance(entry, TensorStorageMetadata)):
            continue
        if entry is None:
            raise CheckpointError(
                f"{path} holds no {name}: it is a checkpoint of another model or another number of ranks; "
                "resume with the configuration and ranks that wrote it"
            )
        if tuple(entry.size) != tuple(shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(entry.size)}, this model expects {list(shape)}; "
                "resume with the configuration that wrote it"
            )


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """A single process is meant to save alone; the library warns of it every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
