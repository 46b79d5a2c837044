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
    Encoded,
    check_scales,
    errors,
    powers_of_two,
    rule_exponents,
    same_bits,
    scale_values,
    to_bytes,
)
from fullweight.checkpoint.published import FP8_BLOCK
from fullweight.core.errors import CheckpointError

LARGEST = 448.0


def decode(codes: Tensor, scales: Tensor, out: Tensor, name: str = "tensor", first_row: int = 0) -> None:
    """codes [rows, columns] e4m3 and scales of the blocks that they touch into out [rows, columns].

    `first_row` is the place of the first row in its block (below 128). `out` is float32 or bfloat16. Raises
    CheckpointError naming `name` on a scale that is no number, or a zero scale over codes that are not zero.
    """
    check_scales(name, scales)
    values = scale_values(scales).contiguous()
    if native.can_run(out):
        numbers = (*codes.shape, first_row)
        native.run("fp8_decode", codes.contiguous(), values, out=out, numbers=numbers)
    else:
        out.copy_(decode_torch(codes, values, first_row))
    if (values == 0).any():
        lost = (_expand(values, codes.shape, first_row) == 0) & (codes.view(torch.uint8) & 0x7F != 0)
        if lost.any():
            raise CheckpointError(
                f"{name}: {int(lost.sum())} values that are not zero have a scale of zero; the file is damaged"
            )
    if bool(torch.isinf(values * LARGEST).any()) and torch.isinf(out).any():
        raise CheckpointError(f"{name}: a scale makes values beyond float32; the file is damaged")


def decode_torch(codes: Tensor, scales: Tensor, first_row: int = 0) -> Tensor:
    """The definition: fp32 [rows, columns] from e4m3 codes and fp32 scales."""
    return codes.float() * _expand(scales, codes.shape, first_row)


def encode(values: Tensor, scales: Tensor | None = None, name: str = "tensor", dtype: str = "F8_E8M0") -> Encoded:
    """values [rows, columns] float32 or bfloat16 to e4m3 codes and scales of dtype `dtype` (F8_E8M0 or F32).

    Row 0 begins a block. `scales`, the source's, are reused where they give back every bit of a block (in
    `values`' dtype). E8M0 scales are uint8 bytes. Raises CheckpointError on a value that is not finite.
    """
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{name} holds values that are not finite; they are not written as FP8")
    wide = values.float()
    amax = _blocks(wide.abs()).amax((1, 3))
    if dtype == "F32":
        chosen = torch.where(amax > 0, amax / LARGEST, 1.0)
    else:
        chosen = to_bytes(rule_exponents(amax, 0.875, 9))
    keep = torch.zeros_like(amax, dtype=torch.bool)
    if scales is not None:
        check_scales(name, scales)
        source = scales if dtype == "F32" else scales.view(torch.uint8)
        codes = _quantise(wide, source)
        exact = same_bits(decode_torch(codes, scale_values(source)), values)
        keep = _blocks(exact, fill=True).all(3).all(1)
        chosen = torch.where(keep, source, chosen)
    if scales is None or not keep.all():
        codes = _quantise(wide, chosen)
    found = errors(decode_torch(codes, scale_values(chosen)), values)
    reused = int(keep.sum())
    return Encoded(codes, chosen, reused, keep.numel() - reused, *found)


def _quantise(wide: Tensor, scales: Tensor) -> Tensor:
    if scales.dtype == torch.float32:
        scaled = wide / _expand(scales, wide.shape)
        scaled = torch.where(wide == 0, wide, scaled)  # a zero scale over zeros
    else:
        scaled = wide * _expand(powers_of_two()[254 - scales.to(torch.int32)], wide.shape)
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


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
