"""Writing a checkpoint folder under the published names (or transformers'), a few rows at a time.

The folder is written beside its final place and renamed when every file is on disk, so that nothing half-written
looks whole. A new layout puts shards as the release does: embedding, one a layer, head, one a MTP block. The
source's own form writes its headers, index and config.json as they were, so an untouched checkpoint comes back
byte for byte. Peak memory is a few chunks of rows beyond the weights that are given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fullweight.checkpoint import fp4, fp8
from fullweight.checkpoint.blocks import Encoded, errors
from fullweight.checkpoint.folder import PublishedFolder, row_chunks
from fullweight.checkpoint.gather import WholeTensors
from fullweight.checkpoint.plan import ExportFormat, Names, Output, make_plan
from fullweight.checkpoint.published import (
    INDEX,
)
from fullweight.checkpoint.receipt import RECEIPT, Receipt, Rounding, described
from fullweight.checkpoint.shards import DTYPES, ShardWriter, as_bytes
from fullweight.checkpoint.source import SOURCE, SourceForm
from fullweight.core import durable
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import Part, Stack, stacks

Progress = Callable[[str, int], None]
"""Told the name of a tensor and the bytes just written."""


class Weights(Protocol):
    """Where values come from: `read` gives rows of a published tensor in a dtype that holds them exactly."""

    def read(self, name: str, start: int, stop: int) -> Tensor: ...

    def origin(self, name: str) -> Any:
        """What the receipt says of a tensor's origin, once it was read."""
        ...


class FolderWeights:
    """The tensors of an open checkpoint folder."""

    def __init__(self, folder: PublishedFolder) -> None:
        self.folder = folder

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.folder.read(name, start, stop)

    def origin(self, name: str) -> Any:
        return self.folder.catalogue.find(name).stored_names()


class ModelWeights:
    """The tensors of a model, under our names, that one process or many hold."""

    def __init__(self, tensors: WholeTensors, config: DeepSeekV4Config) -> None:
        self._tensors = tensors
        self._places = {part.name: (stack.ours, part) for stack in stacks(config) for part in stack.places()}
        self._hashes: dict[str, hashlib._Hash] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._rows(name, start, stop).contiguous()
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.int64):
            rows = rows.float()
        if start == 0:
            self._hashes[name] = hashlib.sha256()
        self._hashes[name].update(as_bytes(rows))
        return rows

    def origin(self, name: str) -> Any:
        ours, part = self._places.get(name, (name, None))
        whole = self._tensors.known[ours]
        return {
            "name": ours,
            "dtype": str(whole.dtype).removeprefix("torch."),
            "shape": list(whole.shape if part is None else part.shape),
            "sha256": self._hashes[name].hexdigest(),
        }

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._places:
            return self._tensors.read(name, ((start, stop), *self._tensors.known[name].box[1:]))
        ours, part = self._places[name]
        box = ((part.row + start, part.row + stop), (0, part.shape[1]))
        if part.expert is None:
            return self._tensors.read(ours, box)
        return self._tensors.read(ours, ((part.expert, part.expert + 1), *box))[0]


def write_checkpoint(
    weights: Weights,
    config: DeepSeekV4Config,
    place: str | Path,
    form: ExportFormat,
    *,
    origin: str,
    operation: str = "export",
    names: Names = "published",
    source: SourceForm | None = None,
    keep_source: SourceForm | None = None,
    write_more: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Write all tensors of a model of this config into the new folder `place`; returns the receipt, also there.

    `form` "source" needs `source` and writes its files as they were laid out, FP4 and FP8 blocks under its
    scales where they are exact. Other forms reuse its scales too where a tensor stays in its format.
    `keep_source` is left in the folder for a later export. Raises CheckpointError if the folder is in use, the
    source is of another model, or the disk refuses; nothing stays behind then.
    """
    place = Path(place)
    check_place(place)
    plan = make_plan(config, form, names, source)
    receipt = Receipt(operation, form, names, origin, left_out=plan.left_out)
    receipt.scales_from = None if source is None else str(source.path)
    with new_folder(place) as staging:
        for file, header in plan.files.items():
            writer = ShardWriter(staging / file, header)
            try:
                for output in plan.outputs.get(file, []):
                    _write_tensor(writer, output, weights, source, receipt, progress)
                for name in plan.raw.get(file, []):
                    assert source is not None
                    _copy_raw(writer, name, source, receipt, progress)
                writer.finish()
            finally:
                writer.close()
        if plan.index is not None:
            (staging / INDEX).write_bytes(plan.index)
        (staging / "config.json").write_bytes(plan.config)
        if keep_source is not None:
            keep_source.keep(staging / SOURCE)
        if write_more is not None:
            write_more(staging)
        if isinstance(weights, FolderWeights):
            receipt.read = _read_entries(weights.folder, receipt)
        receipt.write(staging / RECEIPT)
    return receipt


def check_place(place: Path) -> None:
    """Raise CheckpointError when `place` cannot become a new checkpoint folder."""
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            found = "not empty" if place.is_dir() else "a file"
            raise CheckpointError(f"{place} is {found}; name a new folder for the checkpoint")
        if place.is_mount():
            raise CheckpointError(
                f"{place} is a mount point, which nothing can be renamed to; name a folder in it"
            )
    except OSError as error:
        raise CheckpointError(f"{place} cannot be used: {error.strerror}; name another folder") from None


def unfinished(place: Path) -> list[Path]:
    """Folders beside `place` that were to become it when their process died, or that one is filling now."""
    return sorted(place.parent.glob(f"{_unfinished(place)}*"))


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill that becomes `place` in one rename, after every file is on disk; removed on any failure."""
    final = place.resolve()
    staging = final.with_name(f"{_unfinished(final)}{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        durable.sync_tree(staging)
        if final.exists():
            final.rmdir()
        durable.rename(staging, final)
    except OSError as error:
        raise CheckpointError(
            f"could not write {place}: {error}; nothing was left behind: free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unfinished(place: Path) -> str:
    return f".{place.name}.writing-"


# ---- writing ------------------------------------------------------------------------------------------


def _write_tensor(
    writer: ShardWriter,
    output: Output,
    weights: Weights,
    source: SourceForm | None,
    receipt: Receipt,
    progress: Progress | None,
) -> None:
    rounding = Rounding()
    hashes = {name: hashlib.sha256() for name in (output.name, output.scale) if name is not None}

    def append(name: str, rows: Tensor) -> None:
        data = writer.append(name, rows)
        hashes[name].update(data)
        if progress is not None:
            progress(name, len(data))

    for part in output.parts:
        for first, last in row_chunks(part.shape, 0, part.shape[0]):
            values = weights.read(part.name, first, last)
            if output.scale is None:
                stored = values.to(DTYPES[output.storage])
                if stored.dtype != values.dtype:
                    rounding.add(*errors(stored.float(), values))
                append(output.name, stored)
                continue
            encoded = _encode(output, part.name, values, first, last, source)
            rounding.add_blocks(encoded)
            append(output.name, encoded.codes)
            append(output.scale, encoded.scales.view(DTYPES[output.scale_dtype]))
    origins = [weights.origin(part.name) for part in output.parts]
    for name, digest in hashes.items():
        extra = rounding.as_json() if name == output.name else Rounding().as_json()
        origin = origins[0] if len(origins) == 1 else origins
        receipt.written.append({**_listed(writer, name, digest.hexdigest()), "origin": origin, **extra})


def as_stored(output: Output, values: Tensor, first: int, source: SourceForm | None) -> Tensor:
    """What a reader gets back of rows `values` (from row `first` on, which begins a block) written as `output`.

    `values` are fp32 or int64. Raises CheckpointError on a value that the format has no code for.
    """
    if output.scale is None:
        return values.to(DTYPES[output.storage])
    encoded = _encode(output, output.name, values, first, first + len(values), source)
    scales, decoded = encoded.scales.view(DTYPES[output.scale_dtype]), torch.empty(values.shape)
    decode = fp4.decode if output.storage == "FP4" else fp8.decode
    decode(encoded.codes, scales, decoded, output.name)
    return decoded


def _encode(
    output: Output, name: str, values: Tensor, first: int, last: int, source: SourceForm | None
) -> Encoded:
    stored = None if source is None else source.catalogue.tensors.get(name)
    reusable = stored is not None and (stored.storage, stored.scale_dtype) == (output.storage, output.scale_dtype)
    if output.storage == "FP4":
        scales = source.scales(name, first, last) if source is not None and reusable else None
        return fp4.encode(values, scales, name)
    assert first % 128 == 0, "chunks begin at a block"
    scales = source.scales(name, first // 128, -(-last // 128)) if source is not None and reusable else None
    return fp8.encode(values, scales, name, output.scale_dtype)


def _copy_raw(
    writer: ShardWriter, name: str, source: SourceForm, receipt: Receipt, progress: Progress | None
) -> None:
    digest, shape = hashlib.sha256(), writer.entries[name].shape
    for first, last in row_chunks(shape, 0, shape[0]):
        data = writer.append(name, source.raw(name, first, last))
        digest.update(data)
        if progress is not None:
            progress(name, len(data))
    listed = _listed(writer, name, digest.hexdigest())
    receipt.written.append({**listed, "origin": "draft block, kept aside", **Rounding().as_json()})


def _listed(writer: ShardWriter, name: str, digest: str) -> dict[str, Any]:
    entry = writer.entries[name]
    return {
        "name": name,
        "file": writer.path.name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "bytes": entry.num_bytes,
        "sha256": digest,
    }


def _read_entries(folder: PublishedFolder, receipt: Receipt) -> list[dict[str, Any]]:
    """Every stored tensor of the folder and where it went; what was not needed for a value is hashed now."""
    destinations: dict[str, str] = {}
    for entry in receipt.written:
        origins = entry["origin"] if isinstance(entry["origin"], list) else []
        for origin in origins:
            for name in origin if isinstance(origin, list) else [origin]:
                destinations.setdefault(name, entry["name"])
    destinations |= dict.fromkeys(folder.catalogue.copies, "ignored: a copy of shared weights")
    destinations |= dict.fromkeys(folder.catalogue.draft_names(), "kept aside: draft block of DSpark")
    for item in receipt.left_out:
        stored = folder.catalogue.tensors.get(item["name"])
        for name in [item["name"]] if stored is None else stored.stored_names():
            destinations.setdefault(name, f"left out: {item['why']}")
    places = {part.name: where(part, stack) for stack in stacks(folder.config) for part in stack.places()}
    found = []
    for name in folder.files:
        folder.hash_whole(name)
        parameter = places.get(name, name) if name in folder.catalogue.tensors else None
        found.append({**described(folder, name), "destination": destinations[name], "parameter": parameter})
    return found


def where(part: Part, stack: Stack) -> str:
    """`experts.gate_up[3, 0:2048]`: the part of ours that a published tensor is."""
    rows = f"{part.row}:{part.row + part.shape[0]}"
    return f"{stack.ours}[{rows if part.expert is None else f'{part.expert}, {rows}'}]"
