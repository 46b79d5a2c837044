"""What 100 % MFU means on this machine: how fast it multiplies bf16 matrices, measured in one way everywhere.

x @ W.T as a linear layer does it, W stored [out, in], bf16 throughout; the median over repeats of each shape. The
peak is the best of the shapes. A run measures it at its start, on every rank at once; the benchmark before every
length. On a CPU the shapes are a large square and a flat product of a model's own kind, because which of the two
is faster depends on the machine; an accelerator needs larger ones to be full.

Left out: peaks from data sheets (give `train.peak_flops_per_second`).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from fullweight.devices import of, separate

CPU_SHAPES = ((2048, 2048, 2048), (4096, 512, 512))
"""(rows, in, out)."""
ACCELERATOR_SHAPES = ((8192, 8192, 8192),)
_WARM_UP, _REPEATS, _FEWEST, _SECONDS = 2, 15, 3, 2.0


@dataclass(frozen=True)
class MatmulRate:
    """Speed of one shape; `spread` is (slowest - fastest) / median time."""

    shape: tuple[int, int, int]
    flops_per_second: float
    spread: float

    @property
    def name(self) -> str:
        """Rows, in, out."""
        return " x ".join(map(str, self.shape))


def matmul_rates(
    device: torch.device, shapes: tuple[tuple[int, int, int], ...] | None = None
) -> tuple[MatmulRate, ...]:
    """One rate for each shape (those of the device when not given).

    15 repeats after 2 that warm up; on a slow machine fewer, at least 3, once a shape has taken 2 seconds.
    """
    shapes = shapes or (ACCELERATOR_SHAPES if separate(device) else CPU_SHAPES)
    return tuple(_rate(shape, device) for shape in shapes)


def _rate(shape: tuple[int, int, int], device: torch.device) -> MatmulRate:
    rows, inner, outer = shape
    x = torch.randn(rows, inner, device=device).to(torch.bfloat16)
    weight = torch.randn(outer, inner, device=device).to(torch.bfloat16)
    for _ in range(_WARM_UP):
        _timed(x, weight)
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (len(seconds) < _REPEATS and sum(seconds) < _SECONDS):
        seconds.append(_timed(x, weight))
    median = statistics.median(seconds)
    return MatmulRate(shape, 2 * rows * inner * outer / median, (max(seconds) - min(seconds)) / median)


def _timed(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    of(x.device).synchronize()
    return time.perf_counter() - start
