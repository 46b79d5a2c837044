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
_ONES = ("norm.weight", "enorm.weight", "hnorm.weight")
_ZEROS = ("_base", "attn_sink", "ape", "gate.bias")
_BY_RULE = (*_ONES, "_scale", *_ZEROS, "tid2eid")
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
    if name.endswith(_ONES):
        part.fill_(1.0)
    elif name.endswith("_scale"):
        part.fill_(torch.tensor(HYPER_CONNECTION_SCALE, dtype=torch.float32).item())  # in fp64 too an fp32 number
    elif name.endswith(_ZEROS):
        part.zero_()
    elif name.endswith("tid2eid"):
        table = hash_table(config.vocab_size, config.n_routed_experts, shape[1], seed, name)
        part.copy_(table[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))])
    else:
        _draw(part, offset, shape, config.initializer_range, _generator(seed, name))


class FreshTensor:
    """A parameter or buffer of the whole `shape`, given out in rows: for writing a model that fits no memory.

    The rows of drawn tensors are drawn once, so they must be asked for in ascending order; a few are held.
    """

    def __init__(self, name: str, shape: tuple[int, ...], config: DeepSeekV4Config, seed: int) -> None:
        self.name, self.shape, self.config, self.seed = name, shape, config, seed
        self._rows: Iterator[tuple[int, int, Tensor]] | None = None
        if not name.endswith(_BY_RULE):
            self._rows = _drawn_rows(shape, config.initializer_range, _generator(seed, name))
        self._first = self._last = 0
        self._held = torch.empty(0)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, [stop - start, ...]; of a stack of matrices, counted through all of them."""
        if self._rows is None:
            dtype = torch.int64 if self.name.endswith("tid2eid") else torch.float32
            part = torch.empty(stop - start, *self.shape[1:], dtype=dtype)
            fill_part(self.name, part, (start, *(0 for _ in self.shape[1:])), self.shape, self.config, self.seed)
            return part
        assert start >= self._first, f"{self.name}: rows from {start} on were given out before"
        part, at = torch.empty(stop - start, self.shape[-1]), start
        while at < stop:
            while at >= self._last:
                self._first, self._last, self._held = next(self._rows)
            end = min(stop, self._last)
            part[at - start : end - start] = self._held[at - self._first : end - self._first]
            at = end
        return part


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
    height = shape[-2]
    num_matrices, num_rows, num_columns = block.shape
    for first, last, drawn in _drawn_rows(shape, deviation, generator):
        for matrix in range(max(first // height, above), min(-(-last // height), above + num_matrices)):
            here = matrix * height + top
            start, stop = max(first, here), min(last, here + num_rows)
            if start < stop:
                rows = drawn[start - first : stop - first, left : left + num_columns]
                block[matrix - above, start - here : stop - here].copy_(rows)
        if last >= (above + num_matrices) * height:
            return  # the rest is others'


def _drawn_rows(
    shape: tuple[int, ...], deviation: float, generator: torch.Generator
) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, rows) of a whole tensor, matrices under each other, in order: the numbers of one `normal_`."""
    width = shape[-1]
    for first, last in _row_ranges(math.prod(shape) // width, width):
        yield first, last, torch.empty(last - first, width).normal_(0.0, deviation, generator=generator)


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
