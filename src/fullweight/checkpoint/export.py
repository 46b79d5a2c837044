"""Writing a checkpoint folder under the published names (or transformers'), a few rows at a time.

The folder is written beside its final place and renamed when every file is on disk, so that nothing half-written
looks whole. A new layout puts shards as the release does: embedding, one a layer, head, one a MTP block. The
source's own form writes its headers, index and config.json as they were, so an untouched checkpoint comes back
byte for byte. Peak memory is a few chunks of rows beyond the weights that are given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fullweight.checkpoint import fp4, fp8
from fullweight.checkpoint.blocks import Encoded, errors
from fullweight.checkpoint.catalogue import Stored
from fullweight.checkpoint.folder import PublishedFolder, row_chunks
from fullweight.checkpoint.published import (
    INDEX,
    LAYOUTS,
    Layout,
    PublishedTensor,
    num_shards,
    published_tensors,
    shard_file,
    stored_parts,
)
from fullweight.checkpoint.receipt import RECEIPT, Receipt, Rounding, described
from fullweight.checkpoint.shards import DTYPES, ShardWriter, as_bytes, make_header
from fullweight.checkpoint.source import SOURCE, SourceForm
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import Part, Stack, stacks, to_published, transformers_name

ExportFormat = Literal["bfloat16", "float32", "fp8", "fp4", "source"]
Names = Literal["published", "transformers"]
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
    """The tensors of a model in memory, under our names."""

    def __init__(self, tensors: Mapping[str, Tensor], config: DeepSeekV4Config) -> None:
        self._published = to_published(tensors, config)
        self._ours = {part.name: stack.ours for stack in stacks(config) for part in stack.places()}
        self._hashes: dict[str, hashlib._Hash] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._published[name][start:stop].detach().cpu().contiguous()
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.int64):
            rows = rows.float()
        if start == 0:
            self._hashes[name] = hashlib.sha256()
        self._hashes[name].update(as_bytes(rows))
        return rows

    def origin(self, name: str) -> Any:
        tensor = self._published[name]
        return {
            "name": self._ours.get(name, name),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": self._hashes[name].hexdigest(),
        }


@dataclass(frozen=True)
class Output:
    """A tensor to write: published tensors one after the other, stored as `storage` (see `Layout`)."""

    name: str
    parts: tuple[PublishedTensor, ...]
    storage: str
    scale: str | None = None
    scale_dtype: str = "F8_E8M0"


@dataclass(frozen=True)
class Plan:
    """What a folder will hold: each file's header and tensors; raw ones are copied from the source."""

    files: dict[str, bytes]
    outputs: dict[str, list[Output]]
    raw: dict[str, list[str]]
    index: bytes | None
    config: bytes
    left_out: list[dict[str, str]]


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
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        found = "not empty" if place.is_dir() else "a file"
        raise CheckpointError(f"{place} is {found}; name a new folder for the export")
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


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill that becomes `place` in one rename, after every file is on disk; removed on any failure."""
    final = place.resolve()
    staging = final.with_name(f".{final.name}.writing-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in sorted(staging.rglob("*")):
            _sync(path)
        _sync(staging)
        if final.exists():
            final.rmdir()
        staging.rename(final)
        _sync(final.parent)
    except OSError as error:
        raise CheckpointError(
            f"could not write {place}: {error}; nothing was left behind: free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---- plans --------------------------------------------------------------------------------------------


def make_plan(config: DeepSeekV4Config, form: ExportFormat, names: Names, source: SourceForm | None) -> Plan:
    """Decide every name, dtype, shape and file before anything is written. Raises CheckpointError."""
    if form == "source":
        if names != "published":
            raise CheckpointError("the source's form has the published names; use --format bfloat16 with others")
        if source is None:
            raise CheckpointError(
                "the form of the source is not known here: name the published folder, or an import of it, "
                "with --source"
            )
        return _source_plan(config, source)
    layout = LAYOUTS[form]
    if names == "transformers":
        if form not in ("bfloat16", "float32"):
            raise CheckpointError(f"transformers' own names go with bfloat16 or float32, not {form}")
        return _transformers_plan(config, layout)
    return _layout_plan(config, layout, source)


def _source_plan(config: DeepSeekV4Config, source: SourceForm) -> Plan:
    wanted = {tensor.name: tensor for tensor in published_tensors(config)}
    held = source.catalogue.tensors
    differing = sorted(n for n in wanted.keys() | held.keys() if not _same(wanted.get(n), held.get(n)))
    if differing:
        raise CheckpointError(
            f"{source.path} is the form of another model: {differing[0]} differs; name the source of these weights"
        )
    outputs: dict[str, list[Output]] = {}
    for name, stored in held.items():
        output = Output(name, (wanted[name],), stored.storage, stored.scale, stored.scale_dtype or "F8_E8M0")
        outputs.setdefault(source.files[name], []).append(output)
    for name in source.catalogue.copies:
        outputs.setdefault(source.files[name], []).append(_copy_of(name, source, wanted))
    raw: dict[str, list[str]] = {}
    for name in source.catalogue.draft_names():
        raw.setdefault(source.files[name], []).append(name)
    return Plan(source.headers, outputs, raw, source.index_bytes, source.config_bytes, [])


def _same(tensor: PublishedTensor | None, stored: Stored | None) -> bool:
    return tensor is not None and stored is not None and tensor.shape == stored.shape


def _copy_of(name: str, source: SourceForm, wanted: dict[str, PublishedTensor]) -> Output:
    """A copy of the embedding or head inside the MTP block is written from the tensor that it copies."""
    original = wanted["head.weight" if name.endswith("head.weight") else "embed.weight"]
    entry = source.catalogue.entries[name]
    if entry.shape != original.shape or entry.dtype not in ("BF16", "F32", "F16"):
        raise CheckpointError(
            f"{source.path}: {name} is {entry.dtype} {list(entry.shape)}, no copy of {original.name} "
            f"{list(original.shape)}; export as bfloat16, fp8 or fp4 instead"
        )
    return Output(name, (original,), entry.dtype)


def _layout_plan(config: DeepSeekV4Config, layout: Layout, source: SourceForm | None) -> Plan:
    count = num_shards(config) if config.num_nextn_predict_layers else config.num_hidden_layers + 2
    headers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    outputs: dict[str, list[Output]] = {}
    held = {} if source is None else source.catalogue.tensors
    for tensor in published_tensors(config):
        storage, scale_dtype = layout.stored_as(tensor.kind), layout.scale
        stored = held.get(tensor.name)
        if stored is not None and stored.storage == storage and stored.scale_dtype is not None:
            scale_dtype = stored.scale_dtype
        parts = list(stored_parts(tensor, storage, scale_dtype))
        file = shard_file(tensor.shard, count)
        headers.setdefault(file, {}).update({part.name: (part.dtype, part.shape) for part in parts})
        scale = parts[1].name if len(parts) > 1 else None
        outputs.setdefault(file, []).append(Output(tensor.name, (tensor,), storage, scale, scale_dtype))
    left_out = []
    if source is not None:
        why = "a draft block of DSpark, which only the source's form holds"
        left_out = [{"name": name, "why": why} for name in source.catalogue.draft_names()]
    return _plan(config, layout, headers, outputs, left_out)


def _transformers_plan(config: DeepSeekV4Config, layout: Layout) -> Plan:
    stacked = {part.name: stack.shape for stack in stacks(config) for part in stack.places()}
    order = [part.name for stack in stacks(config) for part in stack.places()]
    tensors = {tensor.name: tensor for tensor in published_tensors(config)}
    grouped: dict[str, list[PublishedTensor]] = {}
    left_out = []
    for name in [*(n for n in tensors if n not in stacked), *order]:
        theirs = transformers_name(name)
        if theirs is None:
            left_out.append({"name": name, "why": "transformers has no MTP block"})
        else:
            grouped.setdefault(theirs, []).append(tensors[name])
    headers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    outputs: dict[str, list[Output]] = {}
    for theirs, parts in grouped.items():
        storage, first = layout.stored_as(parts[0].kind), parts[0]
        file = shard_file(first.shard, config.num_hidden_layers + 2)
        shape = stacked[first.name] if ".mlp.experts." in theirs else first.shape
        headers.setdefault(file, {})[theirs] = (storage, shape)
        outputs.setdefault(file, []).append(Output(theirs, tuple(parts), storage))
    return _plan(config, layout, headers, outputs, left_out)


def _plan(
    config: DeepSeekV4Config,
    layout: Layout,
    headers: dict[str, dict[str, tuple[str, tuple[int, ...]]]],
    outputs: dict[str, list[Output]],
    left_out: list[dict[str, str]],
) -> Plan:
    weight_map = dict(sorted((name, file) for file, tensors in headers.items() for name in tensors))
    stored = (part for tensors in headers.values() for part in tensors.values())
    total = sum(torch.Size(shape).numel() * DTYPES[dtype].itemsize for dtype, shape in stored)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files = {file: make_header(tensors) for file, tensors in sorted(headers.items())}
    published = json.dumps(published_config(config, layout), indent=2) + "\n"
    return Plan(files, outputs, {}, (json.dumps(index, indent=2) + "\n").encode(), published.encode(), left_out)


def published_config(config: DeepSeekV4Config, layout: Layout) -> dict[str, Any]:
    """config.json of weights in a layout, draft blocks left out: what it says of storage is what is stored."""
    found = config.to_published(torch_dtype="float32" if layout.plain == "F32" else "bfloat16")
    found = {key: value for key, value in found.items() if not key.startswith("dspark_")}
    found["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    quantised = {key: found.pop(key, None) for key in ("quantization_config", "expert_dtype")}
    if layout.matrix == "F8_E4M3":
        default = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        found["quantization_config"] = quantised["quantization_config"] or default
        found["expert_dtype"] = "fp4" if layout.expert == "FP4" else "fp8"
    return found


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
