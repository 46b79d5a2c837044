"""What an export will write, decided before anything is written: files, headers, and which tensor goes where.

A plan follows a layout of `published.LAYOUTS` with the release's shards, the source's own files, or transformers'
names. It also says what is known and left out, and why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fullweight.checkpoint.catalogue import Stored
from fullweight.checkpoint.published import (
    LAYOUTS,
    Layout,
    PublishedTensor,
    num_shards,
    published_tensors,
    shard_file,
    stored_parts,
)
from fullweight.checkpoint.shards import DTYPES, make_header
from fullweight.checkpoint.source import SourceForm
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import stacks, transformers_name

ExportFormat = Literal["bfloat16", "float32", "fp8", "fp4", "source"]
Names = Literal["published", "transformers"]


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
