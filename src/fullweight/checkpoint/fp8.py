"""FP8 matrices: one e4m3 code a value, one scale (E8M0, or fp32 in the Base releases) for 128 x 128 values.

Blocks at the right and bottom edge are smaller where a side is no multiple of 128. value = code * scale in fp32;
under an E8M0 scale that is exact, and exact in bf16. Rounding is to the nearest code, ties to even; beyond 448 it
saturates. New scales follow the rule of the release: 2^ceil(log2(amax / 448)) for E8M0, amax / 448 for fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.checkpoint import native
from fullweight.checkpoint.blocks import (
    Coded,
    Encoded,
    check_scales,
    joined,
    row_spans,
    row_sums,
    rule_exponents,
    same_bits,
    scale_values,
    to_bytes,
    write_products,
)
from fullweight.checkpoint.published import FP8_BLOCK
from fullweight.core.errors import CheckpointError

LARGEST = 448.0
_FP16_BITS = 0xBF80 - 0x10000  # sign, and what e4m3 has of exponent and mantissa


def decode(codes: Tensor, scales: Tensor, out: Tensor, name: str = "tensor", first_row: int = 0) -> None:
    """codes [rows, columns] e4m3 and scales of the blocks that they touch into out [rows, columns].

    `first_row` is the place of the first row in its block (below 128). `out` is float32 or bfloat16. Raises
    CheckpointError naming `name` on a scale that is no number, or a zero scale over codes that are not zero.
    """
    check_scales(name, scales)
    values = scale_values(scales).contiguous()
    if native.can_run(out):
        numbers = (*codes.shape, first_row)
        native.decode("fp8_decode", codes.contiguous(), values, out=out, numbers=numbers)
    else:
        decode_torch(codes, values, out, first_row)
    if (values == 0).any():
        lost = (_expand(values, codes.shape, first_row) == 0) & (codes.view(torch.uint8) & 0x7F != 0)
        if lost.any():
            raise CheckpointError(
                f"{name}: {int(lost.sum())} values that are not zero have a scale of zero; the file is damaged"
            )
    if bool(torch.isinf(values * LARGEST).any()) and torch.isinf(out).any():
        raise CheckpointError(f"{name}: a scale makes values beyond float32; the file is damaged")


def decode_torch(codes: Tensor, scales: Tensor, out: Tensor, first_row: int = 0) -> None:
    """The definition: e4m3 codes times fp32 scales, rounded to fp32 and then to `out`'s dtype.

    A code's bits, moved to fp16's exponent and mantissa, are its value / 256. torch does that and the widening
    many at a time; its own conversion of e4m3 goes one by one.
    """
    spans = row_spans(*out.shape)
    columns, wide = out.shape[1], -(-out.shape[1] // FP8_BLOCK) * FP8_BLOCK
    halves = torch.zeros(spans[0].stop, wide, dtype=torch.int16)
    numbers = torch.empty(spans[0].stop, wide)
    late = bool((scales > torch.finfo(torch.float32).max / 256).any())
    bands = torch.arange(first_row, first_row + len(out)) // FP8_BLOCK
    factors = (scales if late else scales * 256).index_select(0, bands)
    for span in spans:
        stored, half, values = codes[span], halves[: span.stop - span.start], numbers[: span.stop - span.start]
        half[:, :columns].copy_(stored.view(torch.int8))
        values.copy_(half.mul_(128).bitwise_and_(_FP16_BITS).view(torch.float16))
        if int(stored.view(torch.int8).max()) == 0x7F or int(stored.view(torch.uint8).max()) == 0xFF:
            values[:, :columns].masked_fill_(stored.view(torch.uint8) & 0x7F == 0x7F, float("nan"))
        if late:
            values.mul_(256)
        write_products(values.unflatten(1, (-1, FP8_BLOCK)), factors[span], out[span])


def encode(values: Tensor, scales: Tensor | None = None, name: str = "tensor", dtype: str = "F8_E8M0") -> Encoded:
    """values [rows, columns] float32 or bfloat16 to e4m3 codes and scales of dtype `dtype` (F8_E8M0 or F32).

    Row 0 begins a block. `scales`, the source's, are reused where they give back every bit of a block (in
    `values`' dtype). E8M0 scales are uint8 bytes. Raises CheckpointError on a value that is not finite.
    """
    source = None
    if scales is not None:
        check_scales(name, scales)
        source = scales if dtype == "F32" else scales.view(torch.uint8)
    encode_with = _encode_compiled if native.can_run(values) else encode_torch
    return encode_with(values, source, dtype).finish(name, "they are not written as FP8")


def _encode_compiled(values: Tensor, source: Tensor | None, dtype: str) -> Coded:
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    blocks = (-(-values.shape[0] // FP8_BLOCK), -(-values.shape[1] // FP8_BLOCK))
    scales = torch.empty(blocks, dtype=torch.float32 if dtype == "F32" else torch.uint8)
    kernel = "fp8_wide_encode" if dtype == "F32" else "fp8_encode"
    return native.encode(kernel, values, source, codes, scales)


def encode_torch(values: Tensor, source: Tensor | None, dtype: str) -> Coded:
    """The definition; `source` are scales in `dtype`, E8M0 as uint8."""
    parts = []
    for span in row_spans(values.shape[0], values.shape[1], FP8_BLOCK):
        blocks = slice(span.start // FP8_BLOCK, -(-span.stop // FP8_BLOCK))
        parts.append(_encode_rows(values[span], None if source is None else source[blocks], dtype))
    return joined(parts)


def _encode_rows(values: Tensor, source: Tensor | None, dtype: str) -> Coded:
    wide = values.float()
    amax = _blocks(wide.abs()).amax((1, 3))
    if dtype == "F32":
        chosen = torch.where(amax / LARGEST > 0, amax / LARGEST, 1.0)  # a quotient below fp32 is 0 too
    else:
        chosen = to_bytes(rule_exponents(amax, 0.875, 9))
    kept = torch.zeros_like(amax, dtype=torch.bool)
    if source is not None:
        codes = _quantise(wide, source)
        exact = same_bits(_decoded(codes, source), values)
        kept = _blocks(exact, fill=True).all(3).all(1)
        chosen = torch.where(kept, source, chosen)
    if source is None or not kept.all():
        codes = _quantise(wide, chosen)
    return Coded(codes, chosen, kept, row_sums(_decoded(codes, chosen), values))


def _quantise(wide: Tensor, scales: Tensor) -> Tensor:
    if scales.dtype == torch.float32:
        scaled = wide / _expand(scales, wide.shape)
        scaled = torch.where(wide == 0, wide, scaled)  # a zero scale over zeros
    else:
        scaled = wide * _expand(scale_values(254 - scales), wide.shape)
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(codes.shape)
    decode_torch(codes, scale_values(scales), out)
    return out


def _expand(scales: Tensor, shape: torch.Size, first_row: int = 0) -> Tensor:
    """One scale an element: [rows, columns]."""
    rows, columns = shape
    whole = scales.repeat_interleave(FP8_BLOCK, 0)[first_row : first_row + rows]
    return whole.repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def _blocks(values: Tensor, fill: bool = False) -> Tensor:
    """[rows, columns] to [row blocks, 128, column blocks, 128], edges padded."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK), value=fill)
    return padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
