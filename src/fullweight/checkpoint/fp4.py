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
    Coded,
    Encoded,
    check_scales,
    joined,
    powers_of_two,
    row_spans,
    row_sums,
    rule_exponents,
    same_bits,
    scale_values,
    to_bytes,
    write_products,
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
        native.decode("fp4_decode", *inputs, out=out, numbers=(out.shape[0], out.shape[1]))
    else:
        decode_torch(codes, exponents, out)
    if int(exponents.max()) >= _OVERFLOW and not torch.isfinite(out).all():
        raise CheckpointError(f"{name}: a scale of 2^126 or more makes values beyond float32; the file is damaged")


def decode_torch(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """The definition: uint8 codes and scales into `out`, which holds every product of the two exactly.

    Two bytes at a time are looked up as four bf16, one as two fp32: look-ups are what torch is slow at.
    """
    narrow = out.dtype == torch.bfloat16
    spans = row_spans(*out.shape)
    rows, blocks = spans[0].stop, scales.shape[1]
    index = torch.zeros(rows, blocks * (8 if narrow else 16), dtype=torch.int32)
    numbers = torch.empty(index.numel(), dtype=torch.int64)
    factors = scale_values(scales, out.dtype)
    for span in spans:
        count = span.stop - span.start
        stored = _whole_blocks(packed[span])
        places = index[:count].copy_(stored.view(torch.uint16) if narrow else stored).flatten()
        values = torch.index_select(_numbers(narrow), 0, places, out=numbers[: len(places)]).view(out.dtype)
        write_products(values.view(count, blocks, FP4_COLUMNS), factors[span], out[span])


def _whole_blocks(packed: Tensor) -> Tensor:
    """Rows padded to whole blocks, at an even address."""
    missing = -packed.shape[1] % (FP4_COLUMNS // 2)
    if missing:
        return F.pad(packed, (0, missing))
    return packed.clone() if packed.storage_offset() % 2 else packed


def encode(values: Tensor, scales: Tensor | None = None, name: str = "tensor") -> Encoded:
    """values [rows, columns] float32 or bfloat16 to int8 codes [rows, columns/2] and uint8 E8M0 scales.

    `scales`, the source's, are reused where they give back every bit of a block (in `values`' dtype); without
    them, and elsewhere, the rule decides. Raises CheckpointError on a value that is not finite.
    """
    source = None
    if scales is not None:
        check_scales(name, scales)
        source = scales.view(torch.uint8)
    found = _encode_compiled(values, source) if native.can_run(values) else encode_torch(values, source)
    return found.finish(name, "FP4 has no code for them")


def _encode_compiled(values: Tensor, source: Tensor | None) -> Coded:
    rows, columns = values.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.int8)
    scales = torch.empty(rows, -(-columns // FP4_COLUMNS), dtype=torch.uint8)
    return native.encode("fp4_encode", values, source, codes, scales)


def encode_torch(values: Tensor, source: Tensor | None) -> Coded:
    """The definition; `source` are uint8 scales."""
    spans = row_spans(*values.shape)
    return joined([_encode_rows(values[span], None if source is None else source[span]) for span in spans])


def _encode_rows(values: Tensor, source: Tensor | None) -> Coded:
    rows, columns = values.shape
    wide = values.float()
    chosen = to_bytes(rule_exponents(_blocks(wide.abs()).amax(-1), 0.75, 3))
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    if source is not None:
        codes = _quantise(wide, source)
        kept = _blocks(same_bits(_dequantise(codes, source), values), fill=True).all(-1)
        chosen = torch.where(kept, source, chosen)
    if source is None or not kept.all():
        codes = _quantise(wide, chosen)
    pairs = codes.view(rows, columns // 2, 2)
    packed = (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int8)
    return Coded(packed, chosen, kept, row_sums(_dequantise(codes, chosen), values))


def _quantise(wide: Tensor, scales: Tensor) -> Tensor:
    """Codes (uint8, one an element) under the given scales."""
    # 2^-k of scale byte e is byte 254 - e; exact, and infinities saturate below
    scaled = (wide * _expand(scale_values(254 - scales), wide.shape[1])).abs_()
    codes = torch.signbit(wide).view(torch.uint8) << 3
    for boundary in _boundaries().tolist():
        codes += scaled > boundary
    return codes


def _dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    values = _values().index_select(0, codes.to(torch.int32).flatten()).view(codes.shape)
    return values * _expand(scale_values(scales), codes.shape[1])


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
def _numbers(narrow: bool) -> Tensor:
    """int64: the four bf16 values of each two bytes [65536], or the two fp32 values of each byte [256]."""
    byte = torch.arange(256)
    pairs = torch.stack((_values()[byte & 15], _values()[byte >> 4]), 1)
    if not narrow:
        return pairs.view(torch.int64).squeeze(1)
    low, high = pairs.expand(256, 256, 2), pairs.unsqueeze(1).expand(256, 256, 2)
    return torch.cat((low, high), 2).to(torch.bfloat16).view(torch.int64).flatten()


@functools.cache
def _boundaries() -> Tensor:
    """[7] fp32: the number of them below |x| is x's code. Ties go to the even code."""
    middles = (torch.tensor(MAGNITUDES[1:]) + torch.tensor(MAGNITUDES[:-1])) / 2
    below = torch.nextafter(middles, torch.zeros(()))
    up = torch.arange(7) % 2 == 1  # a tie between codes 2i - 1 and 2i belongs to 2i
    return torch.where(up, below, middles)


@functools.cache
def _tables() -> Tensor:
    """[256, 32] uint8: for each scale byte, the low bytes of the 16 codes' bf16 values, then the high bytes."""
    values = (_values().unsqueeze(0) * powers_of_two().unsqueeze(1)).to(torch.bfloat16)
    return values.view(torch.uint8).view(256, 16, 2).transpose(1, 2).reshape(256, 32).contiguous()
