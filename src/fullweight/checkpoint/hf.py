"""Checkpoint folders under the published names: safetensors shards, index, config.json, tokenizer.

The folder is written beside its final place and renamed when every file is on disk, so that nothing
half-written looks whole. Shards follow the release: one for the embedding, one per layer, one for the head,
one for the MTP block. Import reads tensor by tensor and checks every name, shape and dtype.
Left out: FP8 and FP4 weights, in and out; a checkpoint that holds them is refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import from_published, to_published
from fullweight.models.deepseek_v4.model import DeepSeekV4

INDEX = "model.safetensors.index.json"
ExportDtype = Literal["bfloat16", "float32"]

# Kept in fp32 by the release whatever the rest is stored in.
_ALWAYS_FLOAT32 = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias")
_READABLE = {torch.float32, torch.bfloat16, torch.float16, torch.int64}


def export_checkpoint(
    model: DeepSeekV4,
    folder: str | Path,
    dtype: ExportDtype = "bfloat16",
    write_tokenizer: Callable[[Path], None] | None = None,
) -> Path:
    """Write the model's weights under the published names; returns the folder.

    Matrices, norms and embeddings are stored in `dtype`; hyper-connections, sinks, position and router biases
    in float32 and hash tables in int64, as the release does. `write_tokenizer(folder)` adds the tokenizer's
    files. Raises CheckpointError if the folder exists and is not empty, or the disk refuses.
    """
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    return export_tensors(tensors, model.config, folder, dtype, write_tokenizer)


def export_tensors(
    tensors: dict[str, Tensor],
    config: DeepSeekV4Config,
    folder: str | Path,
    dtype: ExportDtype = "bfloat16",
    write_tokenizer: Callable[[Path], None] | None = None,
) -> Path:
    """As `export_checkpoint`, from named tensors of a model of this config."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "not empty" if folder.is_dir() else "a file"
        raise CheckpointError(f"{folder} is {found}; name a new folder for the export")
    stored = getattr(torch, dtype)
    place = folder.resolve()
    staging = place.with_name(f".{place.name}.writing-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _write_shards(tensors, config, staging, stored)
        quantization = {"quantization_config", "expert_dtype"}
        published = {k: v for k, v in config.to_published(torch_dtype=dtype).items() if k not in quantization}
        _write_text(staging / "config.json", json.dumps(published, indent=2) + "\n")
        if write_tokenizer is not None:
            write_tokenizer(staging)
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        if place.exists():
            place.rmdir()
        staging.rename(place)
        _sync(place.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {folder}: {error}; nothing was left behind: free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32, **options: Any) -> DeepSeekV4:
    """Build the model that a checkpoint folder describes and fill it; parameters are fp32.

    `options` go to `DeepSeekV4`. Raises CheckpointError on a missing, unexpected or misshapen tensor, or an
    unreadable file, naming it; ConfigError when config.json is of another family.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    config = DeepSeekV4Config.from_file(folder)
    with torch.device("meta"):
        model = DeepSeekV4(config, compute_dtype, **options)
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def load_weights(model: DeepSeekV4, folder: str | Path) -> None:
    """Copy a checkpoint folder's tensors into a model of the same config."""
    published: dict[str, Tensor] = {}
    for path in shard_paths(Path(folder)):
        published.update(_read_shard(path))
    tensors = from_published(published, model.config)
    own, experts = model.state_dict(), model.config.n_routed_experts
    missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or left:
        raise CheckpointError(f"{folder} does not fit the model: missing {_few(missing)}; unexpected {_few(left)}")
    for name, target in own.items():
        tensor = tensors[name]
        if target.shape != tensor.shape:
            found, expected = list(tensor.shape), list(target.shape)
            raise CheckpointError(f"{folder}: {name} has shape {found}, expected {expected}")
        if target.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {name} is stored as {tensor.dtype}, expected {target.dtype}")
        if name.endswith("tid2eid") and not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
            raise CheckpointError(f"{folder}: {name} names experts outside 0 to {experts - 1}")
        with torch.no_grad():
            target.copy_(tensor)


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a checkpoint index: {error}") from None
        foreign = [name for name in names if Path(str(name)).name != name]
        if foreign:
            raise CheckpointError(f"{index} points outside its folder: {_few(foreign)}")
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    paths = [folder / name for name in names]
    absent = [p.name for p in paths if not p.is_file()]
    if not paths or absent:
        raise CheckpointError(
            f"{folder} has no weights: {'missing ' + _few(absent) if absent else 'no .safetensors file'}"
        )
    return paths


def _read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = shard.get_tensor(name)
                if tensor.dtype not in _READABLE:
                    raise CheckpointError(
                        f"{path}: {name} is stored as {tensor.dtype}; expected float32, bfloat16 or float16 "
                        "(convert quantised weights to bfloat16 first)"
                    )
                yield name, tensor
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def shard_of(name: str, config: DeepSeekV4Config) -> int:
    """1-based shard of a published tensor: embedding, one per layer, head, MTP."""
    part = name.split(".")
    if part[0] == "embed":
        return 1
    if part[0] == "layers":
        return 2 + int(part[1])
    return config.num_hidden_layers + (3 if part[0] == "mtp" else 2)


def stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype a published tensor is written in."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if name.endswith(_ALWAYS_FLOAT32) else dtype


def _write_shards(tensors: dict[str, Tensor], config: DeepSeekV4Config, folder: Path, dtype: torch.dtype) -> None:
    count = config.num_hidden_layers + 2 + config.num_nextn_predict_layers
    weight_map: dict[str, str] = {}
    total = 0
    shards: dict[int, dict[str, Tensor]] = {}
    for name, tensor in to_published(tensors, config).items():
        shards.setdefault(shard_of(name, config), {})[name] = tensor
    for number, shard in sorted(shards.items()):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        ready = {n: t.to(stored_dtype(n, t, dtype)).contiguous().clone() for n, t in shard.items()}
        save_file(ready, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(ready, file)
        total += sum(t.numel() * t.element_size() for t in ready.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _few(names: list[str]) -> str:
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
