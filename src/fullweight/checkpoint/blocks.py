"""What the FP4 and FP8 codecs share: power-of-two scales, and what encoding found out about its blocks.

An E8M0 scale is one byte e that means 2^(e - 127); 255 is NaN and is refused wherever it is read. Most blocks can
be written exactly under more than one scale, so a scale that came with a checkpoint is reused for every block
that it still represents exactly; the others take the rule of the release, 2^ceil(log2(amax / largest code)).
Source: the release's inference code (the rule and its floor of 2^-126).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fullweight.core.errors import CheckpointError

NAN_SCALE = 255
_BIAS = 127
_SMALLEST = -126  # exponent that a block of zeros gets


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


@functools.cache
def powers_of_two() -> Tensor:
    """[256] fp32: the value of every E8M0 byte; 255 is NaN."""
    exponents = torch.arange(256, dtype=torch.float64) - _BIAS
    values = torch.exp2(exponents).to(torch.float32)
    values[NAN_SCALE] = float("nan")
    return values


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales (uint8 bytes or float8_e8m0fnu, or fp32 values) as fp32."""
    if scales.dtype == torch.float32:
        return scales
    return powers_of_two()[scales.view(torch.uint8).to(torch.int32)]


def check_scales(name: str, scales: Tensor) -> None:
    """Raise CheckpointError for a scale that means no number: E8M0 NaN; fp32 NaN, infinite or negative."""
    if scales.dtype == torch.float32:
        wrong = ~torch.isfinite(scales) | (scales < 0)
        expected = "finite and not negative"
    else:
        wrong = scales.view(torch.uint8) == NAN_SCALE
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
    wide = values.float()
    difference = decoded.to(values.dtype).float() - wide
    return float(difference.abs().max()), float(difference.square().sum()), float(wide.square().sum())
