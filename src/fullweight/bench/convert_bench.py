"""FP4 and FP8 to bf16 and fp32, in GB/s of output, beside a plain copy of the same output.

The matrices are a release's: the experts' w1 of Flash stacked, and its wq_b. A copy reads and writes as many bytes
as the output has; decoding reads a half or a quarter of that, so it may be faster than the copy. Each repeat runs
copy and decoders in turn, so that whatever else the machine does falls on all alike; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullweight.bench.measure import Waiting
from fullweight.checkpoint import fp4, fp8
from fullweight.checkpoint.native import decoder_name

ROWS, COLUMNS = 16384, 4096
"""Eight experts' w1, or half of wq_b of Flash: 128 MB in bf16, beyond any cache."""
AIM, FLOOR = 0.5, 0.25


@dataclass(frozen=True)
class Rate:
    """Output bytes per second of one operation, and its share of the plain copy's."""

    operation: str
    dtype: str
    bytes_per_second: float
    spread: float  # (slowest - fastest) / median time
    share_of_copy: float


@dataclass(frozen=True)
class ConvertBench:
    """One benchmark: rates, and whether other work disturbed it."""

    decoder: str
    threads: int
    rows: int
    columns: int
    rates: list[Rate]
    waited_share: float | None

    def as_json(self) -> dict[str, Any]:
        rates = [vars(rate) for rate in self.rates]
        return {**vars(self), "rates": rates, "aim_share_of_copy": AIM, "floor_share_of_copy": FLOOR}


def measure_convert(
    rows: int = ROWS, columns: int = COLUMNS, repeats: int = 9, threads: int = 1, seed: int = 0
) -> ConvertBench:
    """Time copy, FP4 and FP8 (E8M0 and fp32 scales) decoding into bf16 and fp32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        waiting, rates = Waiting(), []
        for dtype in (torch.bfloat16, torch.float32):
            rates += _measure(dtype, rows, columns, repeats, seed)
        return ConvertBench(decoder_name(), threads, rows, columns, rates, waiting.share())
    finally:
        torch.set_num_threads(before)


def _measure(dtype: torch.dtype, rows: int, columns: int, repeats: int, seed: int) -> list[Rate]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    packed = draw(0, 256, rows, columns // 2).view(torch.int8)
    small = draw(115, 125, rows, -(-columns // 32)).view(torch.float8_e8m0fnu)
    codes = (draw(0, 256, rows, columns) & 0xF7).view(torch.float8_e4m3fn)  # without NaN
    blocks = (-(-rows // 128), -(-columns // 128))
    large, wide = draw(115, 125, *blocks).view(torch.float8_e8m0fnu), torch.rand(blocks) + 0.1
    out, source = torch.empty(rows, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(source),
        "fp4": lambda: fp4.decode(packed, small, out),
        "fp8": lambda: fp8.decode(codes, large, out),
        "fp8, fp32 scales": lambda: fp8.decode(codes, wide, out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if repeat:  # the first touches the pages and compiles
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    size = out.numel() * out.element_size()
    return [
        Rate(
            name,
            str(dtype).removeprefix("torch."),
            size / medians[name],
            (max(times) - min(times)) / medians[name],
            medians["copy"] / medians[name],
        )
        for name, times in seconds.items()
    ]
