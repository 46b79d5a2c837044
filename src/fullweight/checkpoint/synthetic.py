"""Checkpoints in a release's exact layout with made-up weights: tests and rehearsals need no download.

Names, shapes, dtypes, shards and index are the release's for the config. Codes and scales are drawn directly, not
quantised from values, so that they also hold what a quantiser of ours would never choose: blocks that do not
reach their largest code, blocks of zeros under any scale, minus zero. Scales are set so that the model's
activations stay of order one. Everything depends on the seed and the tensor's name alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from fullweight.checkpoint.export import Progress, check_place, new_folder
from fullweight.checkpoint.folder import row_chunks
from fullweight.checkpoint.plan import published_config
from fullweight.checkpoint.published import (
    FP4_COLUMNS,
    FP8_BLOCK,
    INDEX,
    LAYOUTS,
    Kind,
    Layout,
    PublishedTensor,
    StoredTensor,
    draft_tensors,
    num_shards,
    published_tensors,
    shard_file,
    stored_parts,
)
from fullweight.checkpoint.shards import DTYPES, ShardWriter, make_header
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import hash_table

_TYPICAL_FP4 = 3.0  # root mean square of uniform codes
_TYPICAL_FP8 = 100.0
_ZERO_BLOCKS = 1 / 64


def write_synthetic(
    config: DeepSeekV4Config,
    folder: str | Path,
    layout: str = "fp4",
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of this config in a layout of `LAYOUTS` ("fp4" is the release's); returns the folder.

    A config that announces DSpark gets its draft blocks. Raises CheckpointError if the folder is in use, the
    layout unknown, or the disk refuses.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout {layout!r}; use one of {', '.join(LAYOUTS)}")
    check_place(folder)
    how, count = LAYOUTS[layout], num_shards(config)
    files: dict[str, list[tuple[PublishedTensor, list[StoredTensor]]]] = {}
    for tensor in (*published_tensors(config), *draft_tensors(config)):
        parts = list(stored_parts(tensor, how.stored_as(tensor.kind), how.scale))
        files.setdefault(shard_file(tensor.shard, count), []).append((tensor, parts))
    weight_map, total = {}, 0
    with new_folder(folder) as staging:
        for file, tensors in files.items():
            stored = {part.name: (part.dtype, part.shape) for _, parts in tensors for part in parts}
            writer = ShardWriter(staging / file, make_header(stored))
            try:
                for tensor, parts in tensors:
                    for part in parts:
                        _write(writer, tensor, part, config, seed)
                        weight_map[part.name], total = file, total + part.num_bytes
                        if progress is not None:
                            progress(part.name, part.num_bytes)
                writer.finish()
            finally:
                writer.close()
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        values = _config(config, how)
        (staging / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def _config(config: DeepSeekV4Config, layout: Layout) -> dict[str, object]:
    published = published_config(config, layout)
    if draft_tensors(config):
        published |= {k: v for k, v in config.extra.items() if k.startswith("dspark_")}
        published["num_nextn_predict_layers"] = config.extra.get("num_nextn_predict_layers", 1)
    return published


def _write(
    writer: ShardWriter, tensor: PublishedTensor, part: StoredTensor, config: DeepSeekV4Config, seed: int
) -> None:
    digest = hashlib.sha256(f"{seed}/{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    for first, last in row_chunks(part.shape, 0, part.shape[0]):
        shape = (last - first, *part.shape[1:])
        if tensor.kind is Kind.TABLE:
            rows = hash_table(part.shape[0], config.n_routed_experts, part.shape[1], seed, part.name)[first:last]
        elif part.name != tensor.name:
            rows = _scales(part, tensor, shape, generator)
        else:
            rows = _data(part, shape, generator)
        writer.append(part.name, rows)


def _data(part: StoredTensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if part.dtype == "I8":
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        narrow = _some(shape, FP4_COLUMNS // 2, 1, 0.25, generator)  # blocks of codes 0 to 3
        codes = torch.where(narrow, codes & 0xBB, codes)
        return torch.where(_some(shape, FP4_COLUMNS // 2, 1, _ZERO_BLOCKS, generator), codes & 0x88, codes).view(
            torch.int8
        )
    if part.dtype == "F8_E4M3":
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes)  # 0x7f and 0xff are NaN
        zero = _some(shape, FP8_BLOCK, FP8_BLOCK, _ZERO_BLOCKS, generator)
        return torch.where(zero, codes & 0x80, codes).view(torch.float8_e4m3fn)
    noise = torch.randn(shape, generator=generator)
    if part.name.endswith(("norm.weight", "_scale")):
        noise = 1 + 0.2 * noise
    elif len(shape) > 1 and not part.name.endswith("ape"):
        noise = noise * shape[-1] ** -0.5
    else:
        noise = 0.3 * noise
    return noise.to(DTYPES[part.dtype])


def _scales(
    part: StoredTensor, tensor: PublishedTensor, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    packed = part.shape[0] == tensor.shape[0] and part.shape[1] == -(-tensor.shape[1] // FP4_COLUMNS)
    packed = packed and tensor.kind is Kind.EXPERT
    wanted = tensor.shape[1] ** -0.5 / (_TYPICAL_FP4 if packed else _TYPICAL_FP8)
    if part.dtype == "F32":
        return wanted * (0.5 + torch.rand(shape, generator=generator))
    middle = 127 + round(torch.tensor(wanted).log2().item())
    steps = torch.randint(-1, 2, shape, generator=generator)
    return (middle + steps).to(torch.uint8).view(torch.float8_e8m0fnu)


def _some(shape: tuple[int, ...], columns: int, rows: int, share: float, generator: torch.Generator) -> Tensor:
    """True over a random share of the blocks of `rows` x `columns`."""
    blocks = (-(-shape[0] // rows), -(-shape[1] // columns))
    chosen = torch.rand(blocks, generator=generator) < share
    return chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
