"""Checkpoint folders and models: what `fullweight.load`, training and the command line use.

Import reads tensor by tensor, whatever the format (FP4, FP8, BF16, FP16, FP32; see `folder`), straight into the
target, which may be a rank's shard: only the rows that it holds are read. Beyond the target it needs a few chunks
of rows. Export is `export.write_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint.catalogue import few
from fullweight.checkpoint.export import ModelWeights, write_checkpoint
from fullweight.checkpoint.folder import PartRead, PublishedFolder, shard_paths
from fullweight.checkpoint.gather import WholeTensors
from fullweight.checkpoint.plan import ExportFormat, Names
from fullweight.checkpoint.published import INDEX
from fullweight.checkpoint.slices import Slice
from fullweight.checkpoint.source import SourceForm
from fullweight.core.errors import CheckpointError
from fullweight.core.machine import require_memory
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import Part, stacks
from fullweight.models.deepseek_v4.model import DeepSeekV4

__all__ = [
    "INDEX",
    "ExportFormat",
    "Slice",
    "export_checkpoint",
    "fill_slices",
    "load_model",
    "load_slices",
    "load_weights",
    "shard_paths",
]

# ---- export -------------------------------------------------------------------------------------------


def export_checkpoint(
    model: DeepSeekV4,
    folder: str | Path,
    dtype: ExportFormat = "bfloat16",
    write_tokenizer: Callable[[Path], None] | None = None,
    *,
    names: Names = "published",
    source: SourceForm | None = None,
) -> Path:
    """Write the model's weights as a checkpoint folder; returns the folder.

    `dtype` is what matrices are stored in: "bfloat16", "float32", "fp8", "fp4" (experts FP4, the rest FP8, as
    the release), or "source", the form of the published checkpoint that `source` describes. Hyper-connections,
    sinks, position and router biases stay float32 and hash tables int64. `write_tokenizer(folder)` adds the
    tokenizer's files; `receipt.json` lists every tensor. Raises CheckpointError if the folder exists and is not
    empty, or the disk refuses.
    """
    write_checkpoint(
        ModelWeights(WholeTensors(model.state_dict()), model.config),
        model.config,
        folder,
        dtype,
        origin="a model in memory",
        names=names,
        source=source,
        write_more=write_tokenizer,
    )
    return Path(folder)


# ---- import -------------------------------------------------------------------------------------------


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32, **options: Any) -> DeepSeekV4:
    """Build the model that a checkpoint folder describes and fill it; parameters are fp32.

    Any published format; the draft blocks of a DSpark checkpoint are left aside, and such a model has no MTP
    block. `options` go to `DeepSeekV4`. Raises CheckpointError on a missing, unexpected or misshapen tensor, or an
    unreadable file, naming it; ConfigError when config.json is of another family.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    config = DeepSeekV4Config.from_file(folder)
    check_room(config, str(folder))
    with torch.device("meta"):
        model = DeepSeekV4(config, compute_dtype, **options)
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def check_room(config: DeepSeekV4Config, what: str) -> None:
    """Raise ConfigError when this machine's memory cannot hold the fp32 weights of a model."""
    count = config.num_parameters(mtp=True)
    fix = "load it on a larger machine, or train it on several"
    require_memory(4 * count, f"{what}: a model of {count:,} parameters in float32", fix)


def load_weights(model: DeepSeekV4, folder: str | Path, *, hashing: bool = False) -> list[PartRead]:
    """Fill a model of the same config from a checkpoint folder; of sharded parameters, this rank's part.

    Returns what was read, for the receipt, with its hashes if `hashing`.
    """
    slices = {name: Slice.of(target) for name, target in model.state_dict().items()}
    return load_slices(slices, folder, hashing=hashing)


def load_slices(slices: Mapping[str, Slice], folder: str | Path, *, hashing: bool = False) -> list[PartRead]:
    """Fill the given parts of our tensors (by our names) from a checkpoint folder, reading only what they need.

    Returns what was read, with its hashes if `hashing`. Raises CheckpointError as `load_model`; targets may be
    partly filled then.
    """
    with PublishedFolder(folder, hashing=hashing) as opened:
        fill_slices(opened, slices)
        return opened.parts_read()


@torch.no_grad()
def fill_slices(opened: PublishedFolder, slices: Mapping[str, Slice]) -> None:
    """The same from an open folder."""
    layout = _layout(opened)
    unknown = sorted(slices.keys() - layout.keys())
    if unknown:
        raise CheckpointError(f"{opened.path} does not fit the model: missing {few(unknown)}")
    for name, target in slices.items():
        parts, shape = layout[name]
        if target.shape != shape:
            raise CheckpointError(f"{opened.path}: {name} has shape {list(shape)}, expected {list(target.shape)}")
        for part in parts:
            _fill(opened, part, target)
        if name.endswith("tid2eid"):
            _check_table(name, target.tensor, opened)


def _layout(opened: PublishedFolder) -> dict[str, tuple[list[Part], tuple[int, ...]]]:
    """Our tensors: the published parts that make up each, and its shape."""
    found = {stack.ours: (stack.places(), stack.shape) for stack in stacks(opened.config)}
    stacked = {part.name for parts, _ in found.values() for part in parts}
    for name, stored in opened.catalogue.tensors.items():
        if name not in stacked:
            found[name] = ([Part(name, stored.shape)], stored.shape)
    return found


def _fill(opened: PublishedFolder, part: Part, target: Slice) -> None:
    """Read the overlap of a published tensor with a slice."""
    local, offset = target.tensor, target.offset
    if local.numel() == 0:
        return
    if part.expert is not None:
        index = part.expert - offset[0]
        if not 0 <= index < local.shape[0]:
            return
        local, offset = local[index], offset[1:]
    first = max(part.row, offset[0])
    last = min(part.row + part.shape[0], offset[0] + local.shape[0])
    if first >= last:
        return
    rows = local[first - offset[0] : last - offset[0]]
    opened.read_into(part.name, rows, first - part.row, offset[1] if len(offset) > 1 else 0)


def _check_table(name: str, table: Tensor, opened: PublishedFolder) -> None:
    experts = opened.config.n_routed_experts
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < experts:
        raise CheckpointError(f"{opened.path}: {name} names experts outside 0 to {experts - 1}")
