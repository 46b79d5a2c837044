"""FP4 matrices: two e2m1 codes a byte, one E8M0 scale for 32 columns of a row.

Byte j of a row holds column 2j in its low nibble and column 2j + 1 in its high one. Codes 0 to 7 are 0, 0.5, 1,
1.5, 2, 3, 4, 6 and bit 3 is the sign, so that -0 is a code of its own. value = code * 2^(scale - 127), which
bf16 holds exactly. Rounding is to the nearest code, ties to the even one; beyond 6 it saturates.
Row lengths need not be multiples of 32, only even. Source: the release's inference code.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.checkpoint import native
from fullweight.checkpoint.blocks import (
    Encoded,
    check_scales,
    errors,
    powers_of_two,
    rule_exponents,
    same_bits,
    scale_values,
    to_bytes,
)
from fullweight.checkpoint.published import FP4_COLUMNS
from fullweight.core.errors import CheckpointError

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OVERFLOW = 253  # from this scale byte on, 6 * 2^(byte - 127) exceeds fp32


def decode(packed: Tensor, scales: Tensor, out: Tensor, name: str = "tensor") -> None:
    """packed [rows, columns/2] int8 and scales [rows, ceil(columns/32)] E8M0 into out [rows, columns].

    `out` is float32 or bfloat16, contiguous in its rows. Raises CheckpointError naming `name` on a NaN scale
    or a value beyond fp32.
    """
    check_scales(name, scales)
    codes, exponents = packed.view(torch.uint8), scales.view(torch.uint8)
    if native.can_run(out):
        inputs = (codes.contiguous(), exponents.contiguous(), _tables())
        native.run("fp4_decode", *inputs, out=out, numbers=(out.shape[0], out.shape[1]))
    else:
        out.copy_(decode_torch(codes, exponents))
    if int(exponents.max()) >= _OVERFLOW and not torch.isfinite(out).all():
        raise CheckpointError(f"{name}: a scale of 2^126 or more makes values beyond float32; the file is damaged")


def decode_torch(packed: Tensor, scales: Tensor) -> Tensor:
    """The definition: fp32 [rows, columns] from uint8 codes and scales."""
    pairs = _pairs()[packed.to(torch.int32)]  # [rows, columns / 2, 2]
    values = pairs.flatten(1)
    return values * _expand(scale_values(scales), values.shape[1])


def encode(values: Tensor, scales: Tensor | None = None, name: str = "tensor") -> Encoded:
    """values [rows, columns] float32 or bfloat16 to int8 codes [rows, columns/2] and uint8 E8M0 scales.

    `scales`, the source's, are reused where they give back every bit of a block (in `values`' dtype); without
    them, and elsewhere, the rule decides. Raises CheckpointError on a value that is not finite.
    """
    rows, columns = values.shape
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{name} holds values that are not finite; FP4 has no code for them")
    wide = values.float()
    amax = _blocks(wide.abs()).amax(-1)
    chosen = to_bytes(rule_exponents(amax, 0.75, 3))
    keep = torch.zeros_like(chosen, dtype=torch.bool)
    if scales is not None:
        check_scales(name, scales)
        source = scales.view(torch.uint8)
        codes = _quantise(wide, source)
        keep = _blocks(same_bits(_dequantise(codes, source), values), fill=True).all(-1)
        chosen = torch.where(keep, source, chosen)
    if scales is None or not keep.all():
        codes = _quantise(wide, chosen)
    found = errors(_dequantise(codes, chosen), values)
    pairs = codes.view(rows, columns // 2, 2)
    packed = (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int8)
    reused = int(keep.sum())
    return Encoded(packed, chosen, reused, keep.numel() - reused, *found)


def _quantise(wide: Tensor, scales: Tensor) -> Tensor:
    """Codes (uint8, one an element) under the given scales."""
    # 2^-k of scale byte e is byte 254 - e; exact, and infinities saturate below
    scaled = wide * _expand(powers_of_two()[254 - scales.to(torch.int32)], wide.shape[1])
    magnitude = torch.bucketize(scaled.abs(), _boundaries(), out_int32=True).to(torch.uint8)
    return magnitude | (torch.signbit(wide).to(torch.uint8) << 3)


def _dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    return _values()[codes.to(torch.int32)] * _expand(scale_values(scales), codes.shape[1])


def _expand(scales: Tensor, columns: int) -> Tensor:
    return scales.repeat_interleave(FP4_COLUMNS, 1)[:, :columns]


def _blocks(values: Tensor, fill: bool = False) -> Tensor:
    """[rows, columns] to [rows, blocks, 32], the last block padded."""
    padding = -values.shape[1] % FP4_COLUMNS
    return F.pad(values, (0, padding), value=fill).unflatten(1, (-1, FP4_COLUMNS))


@functools.cache
def _values() -> Tensor:
    """[16] fp32: the value of each code."""
    positive = torch.tensor(MAGNITUDES)
    return torch.cat((positive, -positive))


@functools.cache
def _pairs() -> Tensor:
    """[256, 2] fp32: the two values of each byte."""
    byte = torch.arange(256)
    return torch.stack((_values()[byte & 15], _values()[byte >> 4]), 1)


@functools.cache
def _boundaries() -> Tensor:
    """Ascending: the number of them below |x| is x's code. Ties go to the even code."""
    middles = (torch.tensor(MAGNITUDES[1:]) + torch.tensor(MAGNITUDES[:-1])) / 2
    below = torch.nextafter(middles, torch.zeros(()))
    up = torch.arange(7) % 2 == 1  # a tie between codes 2i - 1 and 2i belongs to 2i
    return torch.where(up, below, middles)


@functools.cache
def _tables() -> Tensor:
    """[256, 32] uint8: for each scale byte, the low bytes of the 16 codes' bf16 values, then the high bytes."""
    values = (_values().unsqueeze(0) * powers_of_two().unsqueeze(1)).to(torch.bfloat16)
    return values.view(torch.uint8).view(256, 16, 2).transpose(1, 2).reshape(256, 32).contiguous()
