"""Fresh weights.

Matrices are N(0, initializer_range^2), norms one, sinks, biases and position biases zero. Hyper-connection
gates start at 0.01 (arXiv 2512.24880, table 5), not at transformers' 1. Hash tables are not published as a
rule; any table with K distinct experts per token, each expert equally often and different per layer fits the
report. Here token t of layer l takes K neighbours on a ring of shuffled experts, starting at a shuffled place.

A tensor's values depend on the seed and its name alone. Who holds a part of it draws the whole, a few rows at a
time, and keeps that part: equal bits however a model is cut, and no whole tensor in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4

HYPER_CONNECTION_SCALE = 0.01
_DRAWN_BYTES = 32 * 2**20
_GROUP = 16  # torch's normal_ turns uniform numbers into normal ones so many at a time


@torch.no_grad()
def initialise(model: DeepSeekV4, seed: int = 0) -> DeepSeekV4:
    """Fill every parameter and buffer in place; each tensor's values depend on the seed and its name alone."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        fill_part(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape), model.config, seed)
    return model


@torch.no_grad()
def fill_part(
    name: str,
    part: Tensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    config: DeepSeekV4Config,
    seed: int,
) -> None:
    """Fill `part`, the block that begins at `offset` of a parameter or buffer of the whole `shape`."""
    if part.numel() == 0:
        return
    if name.endswith(("norm.weight", "enorm.weight", "hnorm.weight")):
        part.fill_(1.0)
    elif name.endswith("_scale"):
        part.fill_(HYPER_CONNECTION_SCALE)
    elif name.endswith(("_base", "attn_sink", "ape", "gate.bias")):
        part.zero_()
    elif name.endswith("tid2eid"):
        table = hash_table(config.vocab_size, config.n_routed_experts, shape[1], seed, name)
        part.copy_(table[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))])
    else:
        _draw(part, offset, shape, config.initializer_range, _generator(seed, name))


def hash_table(vocab_size: int, num_experts: int, top_k: int, seed: int, name: str) -> Tensor:
    """[V, K] int64: K distinct experts per token, loads over the vocabulary equal within one token."""
    generator = _generator(seed, name)
    ring = torch.randperm(num_experts, generator=generator)
    start = torch.randperm(vocab_size, generator=generator) % num_experts
    return ring[(start.unsqueeze(1) + torch.arange(top_k)) % num_experts]


def _draw(
    part: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], deviation: float, generator: torch.Generator
) -> None:
    """N(0, deviation^2) in a block of one matrix or of a stack of them, the numbers of `normal_` on the whole."""
    block = part if part.dim() == 3 else part.unsqueeze(0)
    above, top, left = offset if len(offset) == 3 else (0, *offset)
    height, width = shape[-2:]
    num_matrices, num_rows, num_columns = block.shape
    for first, last in _row_ranges(math.prod(shape) // width, width):
        drawn = torch.empty(last - first, width).normal_(0.0, deviation, generator=generator)
        for matrix in range(max(first // height, above), min(-(-last // height), above + num_matrices)):
            here = matrix * height + top
            start, stop = max(first, here), min(last, here + num_rows)
            if start < stop:
                rows = drawn[start - first : stop - first, left : left + num_columns]
                block[matrix - above, start - here : stop - here].copy_(rows)
        if last >= (above + num_matrices) * height:
            return  # the rest is others'


def _row_ranges(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that give the numbers of one call: whole groups, and a last range of more than one."""
    step = _GROUP // math.gcd(_GROUP, width)
    step *= max(_DRAWN_BYTES // 4 // (width * step), 1)
    first = 0
    while first < rows:
        last = first + step
        if (rows - last) * width < _GROUP:
            last = rows
        yield first, last
        first = last


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
