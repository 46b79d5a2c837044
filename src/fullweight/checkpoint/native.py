"""The compiled codecs of `decode_kernels.cpp` and `encode_kernels.cpp`, where a C++ compiler is; torch does the
same without one.

Which of the two ran is in every receipt and benchmark (`decoder_name`). They give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fullweight.checkpoint.blocks import Coded
from fullweight.core.errors import ConfigError
from fullweight.ops.native import find_compiler, load_library

DECODE = Path(__file__).with_name("decode_kernels.cpp")
ENCODE = Path(__file__).with_name("encode_kernels.cpp")
VARIABLE = "FULLWEIGHT_DECODER"
"""Environment variable that asks for the codecs by name: torch or compiled."""


@functools.cache
def decoder_name() -> str:
    """ "compiled" where a C++ compiler is found, else "torch"; FULLWEIGHT_DECODER overrides."""
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "torch", "compiled"):
        raise ConfigError(f"{VARIABLE} is {asked!r}; use torch or compiled, or unset it")
    return asked or ("compiled" if find_compiler() else "torch")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within, codecs run `name`: torch or compiled."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    decoder_name.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        decoder_name.cache_clear()


def can_run(values: Tensor) -> bool:
    """Whether the compiled codecs can write or read `values` [rows, columns] (any row stride)."""
    return (
        decoder_name() == "compiled"
        and values.device.type == "cpu"
        and values.dtype in (torch.float32, torch.bfloat16)
        and (values.stride(1) == 1 or values.shape[1] == 1)
    )


def decode(name: str, *inputs: Tensor, out: Tensor, numbers: tuple[int, ...]) -> None:
    """Call kernel `name`: contiguous `inputs`, `out`, `numbers`, out's row stride."""
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in inputs)
    _call(DECODE, name, (*inputs, out), (*numbers, out.stride(0)), out.dtype)


def encode(name: str, values: Tensor, source: Tensor | None, codes: Tensor, scales: Tensor) -> Coded:
    """Call kernel `name`, which fills `codes` and `scales`; `source` are scales of their shape and dtype."""
    assert source is None or (source.shape, source.dtype) == (scales.shape, scales.dtype)
    kept = torch.empty(scales.shape, dtype=torch.uint8)
    sums = torch.empty(values.shape[0], 3, dtype=torch.float64)
    tensors = (values.contiguous(), None if source is None else source.contiguous(), codes, scales, kept, sums)
    _call(ENCODE, name, tensors, tuple(values.shape), values.dtype, "-ffp-contract=off")
    return Coded(codes, scales, kept.bool(), sums)


def _call(
    source: Path,
    name: str,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    dtype: torch.dtype,
    *options: str,
) -> None:
    function = getattr(load_library(source, *options), f"{name}_{'h' if dtype == torch.bfloat16 else 'f'}")
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    function(*pointers, *map(ctypes.c_int64, numbers))
