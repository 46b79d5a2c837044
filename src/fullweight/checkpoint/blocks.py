"""What the FP4 and FP8 codecs share: power-of-two scales, and what encoding found out about its blocks.

An E8M0 scale is one byte e that means 2^(e - 127); 255 is NaN and is refused wherever it is read. Most blocks can
be written exactly under more than one scale, so a scale that came with a checkpoint is reused for every block
that it still represents exactly; the others take the rule of the release, 2^ceil(log2(amax / largest code)).
Source: the release's inference code (the rule and its floor of 2^-126).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.core.errors import CheckpointError

NAN_SCALE = 255
_BIAS = 127
_SMALLEST = -126  # exponent that a block of zeros gets
_CACHED = 2**19  # values that torch handles at a time: their intermediate results stay in a core's cache


@dataclass(frozen=True)
class Encoded:
    """Codes and scales of one matrix (or some of its rows) and how they were found.

    `reused_blocks` kept the source's scale and are exact; `rule_blocks` took the rule's. Errors are of decoding
    against the values that were given: the largest, and the sums of squares that a relative error is made of.
    """

    codes: Tensor
    scales: Tensor
    reused_blocks: int
    rule_blocks: int
    max_error: float
    squared_error: float
    squared_norm: float


@dataclass(frozen=True)
class Coded:
    """What an encoder, compiled or torch's, made of a matrix: `kept` [row blocks, column blocks] is true where
    the source's scale was reused, `sums` are its `row_sums`."""

    codes: Tensor
    scales: Tensor
    kept: Tensor
    sums: Tensor

    def finish(self, name: str, what: str) -> Encoded:
        """Raises CheckpointError ("`name` holds values that are not finite; `what`") where a sum is not."""
        norm, squared, worst = _totals(self.sums)
        if not math.isfinite(norm):
            raise CheckpointError(f"{name} holds values that are not finite; {what}")
        reused = int(self.kept.sum())
        return Encoded(self.codes, self.scales, reused, self.kept.numel() - reused, worst, squared, norm)


def joined(parts: list[Coded]) -> Coded:
    """Of consecutive rows."""
    fields = [[part.codes, part.scales, part.kept, part.sums] for part in parts]
    return Coded(*(torch.cat(field) for field in zip(*fields, strict=True)))


def row_spans(rows: int, columns: int, multiple: int = 1) -> list[slice]:
    """Rows that torch handles at a time, inner bounds at multiples of `multiple`; the first span is longest."""
    step = max(_CACHED // max(columns, 1) // multiple, 1) * multiple
    return [slice(first, min(first + step, rows)) for first in range(0, max(rows, 1), step)]


def write_products(values: Tensor, factors: Tensor, out: Tensor) -> None:
    """values [rows, blocks, size] times one factor a block into out [rows, columns], the last block cut."""
    factors = factors.unsqueeze(2)
    if values.dtype == out.dtype and values.shape[1] * values.shape[2] == out.shape[1]:
        torch.mul(values, factors, out=out.unflatten(1, values.shape[1:]))
    else:
        out.copy_(values.mul_(factors).flatten(1)[:, : out.shape[1]])


@functools.cache
def powers_of_two() -> Tensor:
    """[256] fp32: the value of every E8M0 byte; 255 is NaN."""
    exponents = torch.arange(256, dtype=torch.float64) - _BIAS
    values = torch.exp2(exponents).to(torch.float32)
    values[NAN_SCALE] = float("nan")
    return values


def scale_values(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored scales (uint8 bytes or float8_e8m0fnu, none of them NaN; or fp32 values) in fp32 or bf16, exactly."""
    if scales.dtype == torch.float32:
        return scales
    # the byte is the exponent that fp32 and bf16 have, but for byte 0: 2^-127 has no exponent of its own
    if dtype == torch.bfloat16:
        return scales.view(torch.uint8).to(torch.int16).mul_(2**7).clamp_(min=2**6).view(dtype)
    return scales.view(torch.uint8).to(torch.int32).mul_(2**23).clamp_(min=2**22).view(dtype)


def check_scales(name: str, scales: Tensor) -> None:
    """Raise CheckpointError for a scale that means no number: E8M0 NaN; fp32 NaN, infinite or negative."""
    if scales.dtype == torch.float32:
        wrong = ~torch.isfinite(scales) | (scales < 0)
        expected = "finite and not negative"
    else:
        stored = scales.view(torch.uint8)
        if not stored.numel() or int(stored.max()) < NAN_SCALE:  # many times faster than the comparison
            return
        wrong = stored == NAN_SCALE
        expected = "a byte of 0 to 254"
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        found = float(scales[tuple(at)]) if scales.dtype == torch.float32 else "NaN (byte 255)"
        raise CheckpointError(
            f"{name}: the scale of block {at} is {found}, expected {expected} ({int(wrong.sum())} such blocks); "
            "the file is damaged or was written by a faulty converter: fetch it again"
        )


def rule_exponents(amax: Tensor, mantissa: float, exponent: int) -> Tensor:
    """ceil(log2(amax / largest)) as int32, exactly, where largest = mantissa * 2^exponent, mantissa in [0.5, 1).

    amax fp32, not negative. Never below -126; a block of zeros gets that.
    """
    fraction, power = torch.frexp(amax)
    found = power - exponent + (fraction > mantissa).to(torch.int32)
    return torch.where(amax > 0, found, _SMALLEST).clamp(_SMALLEST, _BIAS)


def to_bytes(exponents: Tensor) -> Tensor:
    """E8M0 bytes (uint8) of exponents in [-127, 127]."""
    return (exponents + _BIAS).to(torch.uint8)


def same_bits(found: Tensor, given: Tensor) -> Tensor:
    """Element by element: equal, the sign of zero included. `found` is rounded to `given`'s dtype first."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[given.dtype]
    return found.to(given.dtype).view(integers) == given.contiguous().view(integers)


def errors(decoded: Tensor, values: Tensor) -> tuple[float, float, float]:
    """Largest absolute difference in `values`' dtype, sum of its squares, sum of squares of `values`."""
    if not values.numel():
        return 0.0, 0.0, 0.0
    columns = values.shape[-1] if values.dim() > 1 else values.numel()
    found, given = decoded.reshape(-1, columns), values.reshape(-1, columns)
    norm, squared, worst = _totals(
        torch.cat([row_sums(found[span], given[span]) for span in row_spans(len(given), columns)])
    )
    return worst, squared, norm


def row_sums(decoded: Tensor, values: Tensor) -> Tensor:
    """[rows, 3] fp64: the sum of squares of `values`, that of the errors of `decoded`, and the largest error.

    Errors are differences in `values`' dtype, rounded to fp32; their squares are exact. The order of summation is
    part of the definition (`_squares`), so that neither threads nor the compiled encoders change a bit of it.
    """
    wide = values.float()
    difference = decoded.to(values.dtype).float() - wide
    return torch.stack((_squares(wide), _squares(difference), difference.abs().amax(1).double()), 1)


def _squares(values: Tensor) -> Tensor:
    """[rows]: of each 32 columns in turn, lane j of 8 adds (j + (j + 16)) + ((j + 8) + (j + 24)); then halves."""
    squares = F.pad(values, (0, -values.shape[1] % 32)).double().square_().unflatten(1, (-1, 4, 8))
    lanes = (squares[:, :, 0] + squares[:, :, 2]) + (squares[:, :, 1] + squares[:, :, 3])
    sums = lanes.cumsum(1)[:, -1]
    for half in (4, 2, 1):
        sums = sums[:, :half] + sums[:, half : 2 * half]
    return sums[:, 0]


def _totals(sums: Tensor) -> tuple[float, float, float]:
    """Of `row_sums`; sums over rows are exact, so their order does not matter."""
    norm, squared, worst = sums.T.tolist()
    return math.fsum(norm), math.fsum(squared), max(worst, default=0.0)
