"""What tests of the stored formats share: references in scalar float64 arithmetic, and small folders to try."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullweight.checkpoint.receipt import RECEIPT
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

WKV = "layers.1.attn.wkv"
EXPERT = "layers.2.ffn.experts.3.w2"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(code: int) -> float:
    """Value of a 4-bit code by the definition of the format: sign, 2 exponent bits (bias 1), 1 mantissa bit."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if code & 8 else value


def e4m3(code: int) -> float:
    """Value of an e4m3fn byte: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if code & 0x80 else value


def e8m0(byte: int) -> float:
    return 2.0 ** (byte - 127)


def dequantised(weight: Tensor, scale: Tensor | None) -> Tensor:
    """float64 values of a stored matrix, by its dtype, element by element."""
    if scale is None:
        return weight.double()
    if scale.dtype == torch.float32:
        factors = scale.double().numpy()
    else:
        factors = np.vectorize(e8m0, otypes=[float])(scale.view(torch.uint8).numpy())
    codes = weight.view(torch.uint8).numpy()
    if weight.dtype == torch.int8:
        low = np.vectorize(e2m1, otypes=[float])(codes & 15)
        high = np.vectorize(e2m1, otypes=[float])(codes >> 4)
        values = np.stack((low, high), -1).reshape(codes.shape[0], -1)
        rows, columns = 1, 32
    else:
        values = np.vectorize(e4m3, otypes=[float])(codes)
        rows = columns = 128
    wide = factors.repeat(rows, 0).repeat(columns, 1)[: values.shape[0], : values.shape[1]]
    return torch.from_numpy(values * wide)


def expected_values(folder: Path) -> dict[str, Tensor]:
    """float64 (or int64) values of every published tensor of a folder, read by the safetensors library."""
    stored = {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
    scales = {n: t for n, t in stored.items() if n.endswith(".scale")}
    return {
        name: tensor if tensor.dtype == torch.int64 else dequantised(tensor, scales.get(name[:-6] + "scale"))
        for name, tensor in stored.items()
        if name not in scales
    }


def tiny(**changes: object) -> DeepSeekV4Config:
    """Every block kind, sides that are no multiples of 128 or 32, and fewer than one block in places."""
    sizes = {"moe_intermediate_size": 72, "hidden_size": 144, "q_lora_rank": 40, "n_routed_experts": 4}
    sizes["index_n_heads"] = 32  # fewer can all be silent at once; ties then order entries by chance
    return DeepSeekV4Config.preset("tiny", **{**sizes, **changes})


def with_drafts(config: DeepSeekV4Config, stages: int = 3, rank: int = 8) -> DeepSeekV4Config:
    """The DSpark sibling of a config, as its config.json would say it."""
    published = config.to_published()
    layers = config.num_hidden_layers
    ratios = [*config.compress_ratios[:layers], *[0] * stages]
    dspark = {
        "compress_ratios": ratios,
        "dspark_block_size": 5,
        "dspark_markov_rank": rank,
        "dspark_noise_token_id": 7,
        "dspark_target_layer_ids": [layers - 3, layers - 2, layers - 1],
    }
    return DeepSeekV4Config.from_published({**published, **dspark})


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the shard that holds a stored tensor, and the index to match."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"][name]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    kept = {n: f for n, f in index["weight_map"].items() if f != file}
    path.write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(tensors, file)}}))


def raw(tensor: Tensor) -> Tensor:
    """Its bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the receipt."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != RECEIPT}
