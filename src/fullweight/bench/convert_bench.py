"""FP4 and FP8 to bf16 and fp32 and back, compiled and by torch, in GB/s of values beside a plain copy of as many.

The matrices are a release's: the experts' w1 of Flash stacked, and its wq_b. A copy reads and writes as many bytes
as the values have; a codec reads or writes a half or a quarter of that on the other side, so it may be faster than
the copy. Each repeat runs copy and codecs in turn, so that whatever else the machine does falls on all alike;
figures are medians. Encoders find new scales; where a source's scales are reused they are faster.
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
from fullweight.checkpoint import fp4, fp8, native
from fullweight.ops.native import find_compiler

ROWS, COLUMNS = 16384, 4096
"""Eight experts' w1, or half of wq_b of Flash: 128 MB in bf16, beyond any cache."""
AIM, FLOOR = 0.5, 0.25
"""Shares of a copy that decoding to bf16 is held to."""


@dataclass(frozen=True)
class Rate:
    """Bytes of values (`dtype`) per second of one operation, and its share of the plain copy's.

    `operation` is copy, decode or encode; `format` names the codes and scales, `codec` is compiled or torch.
    """

    operation: str
    format: str
    codec: str
    dtype: str
    bytes_per_second: float
    spread: float  # (slowest - fastest) / median time
    share_of_copy: float


@dataclass(frozen=True)
class ConvertBench:
    """One benchmark: rates, and whether other work disturbed it."""

    threads: int
    rows: int
    columns: int
    rates: list[Rate]
    waited_share: float | None

    def worst_decoder(self) -> Rate:
        """The slowest of those to bf16, beside its copy."""
        decoders = [r for r in self.rates if (r.operation, r.dtype) == ("decode", "bfloat16")]
        return min(decoders, key=lambda rate: rate.share_of_copy)

    def as_json(self) -> dict[str, Any]:
        rates = [vars(rate) for rate in self.rates]
        return {**vars(self), "rates": rates, "aim_share_of_copy": AIM, "floor_share_of_copy": FLOOR}


def codecs() -> list[str]:
    """Those that can run here."""
    return ["compiled", "torch"] if find_compiler() else ["torch"]


def measure_convert(
    rows: int = ROWS, columns: int = COLUMNS, repeats: int = 9, threads: int = 1, seed: int = 0
) -> ConvertBench:
    """Time copying, and decoding and encoding of FP4 and FP8 (E8M0 and fp32 scales), for bf16 and fp32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        waiting, rates = Waiting(), []
        for dtype in (torch.bfloat16, torch.float32):
            rates += _measure(dtype, rows, columns, repeats, seed)
        return ConvertBench(threads, rows, columns, rates, waiting.share())
    finally:
        torch.set_num_threads(before)


def _measure(dtype: torch.dtype, rows: int, columns: int, repeats: int, seed: int) -> list[Rate]:
    work = _work(dtype, rows, columns, seed)
    seconds: dict[tuple[str, str, str], list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            with native.using(name[2] or "torch"):
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
            if repeat:  # the first touches the pages and compiles
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    size = rows * columns * dtype.itemsize
    return [
        Rate(
            *name,
            str(dtype).removeprefix("torch."),
            size / medians[name],
            (max(times) - min(times)) / medians[name],
            medians["copy", "", ""] / medians[name],
        )
        for name, times in seconds.items()
    ]


def _work(dtype: torch.dtype, rows: int, columns: int, seed: int) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """What is timed, by operation, format and codec."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    packed = draw(0, 256, rows, columns // 2).view(torch.int8)
    small = draw(115, 125, rows, -(-columns // 32)).view(torch.float8_e8m0fnu)
    codes = (draw(0, 256, rows, columns) & 0xF7).view(torch.float8_e4m3fn)  # without NaN
    blocks = (-(-rows // 128), -(-columns // 128))
    large, wide = draw(115, 125, *blocks).view(torch.float8_e8m0fnu), torch.rand(blocks) + 0.1
    out = torch.empty(rows, columns, dtype=dtype)
    values = torch.empty(rows, columns, dtype=dtype).normal_(0, 0.02, generator=generator)
    work: dict[tuple[str, str, str], Callable[[], Any]] = {("copy", "", ""): lambda: out.copy_(values)}
    for codec in codecs():
        work["decode", "fp4", codec] = lambda: fp4.decode(packed, small, out)
        work["decode", "fp8", codec] = lambda: fp8.decode(codes, large, out)
        work["decode", "fp8, fp32 scales", codec] = lambda: fp8.decode(codes, wide, out)
        work["encode", "fp4", codec] = lambda: fp4.encode(values)
        work["encode", "fp8", codec] = lambda: fp8.encode(values)
        work["encode", "fp8, fp32 scales", codec] = lambda: fp8.encode(values, dtype="F32")
    return work
