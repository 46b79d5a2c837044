"""The compiled decoders of `codec_kernels.cpp`, where a C++ compiler is; torch does the same without one.

Which of the two ran is in every receipt and benchmark (`decoder_name`). They give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from fullweight.core.errors import ConfigError
from fullweight.ops.native import find_compiler, load_library

SOURCE = Path(__file__).with_name("codec_kernels.cpp")
VARIABLE = "FULLWEIGHT_DECODER"
"""Environment variable that asks for a decoder by name: torch or compiled."""


@functools.cache
def decoder_name() -> str:
    """ "compiled" where a C++ compiler is found, else "torch"; FULLWEIGHT_DECODER overrides."""
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "torch", "compiled"):
        raise ConfigError(f"{VARIABLE} is {asked!r}; use torch or compiled, or unset it")
    return asked or ("compiled" if find_compiler() else "torch")


def can_run(out: Tensor) -> bool:
    """Whether the compiled decoder can write `out` [rows, columns] (any row stride)."""
    return (
        decoder_name() == "compiled"
        and out.device.type == "cpu"
        and out.dtype in (torch.float32, torch.bfloat16)
        and (out.stride(1) == 1 or out.shape[1] == 1)
    )


def run(name: str, *inputs: Tensor, out: Tensor, numbers: tuple[int, ...]) -> None:
    """Call kernel `name`: contiguous `inputs`, `out`, `numbers`, out's row stride."""
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in inputs)
    function = getattr(load_library(SOURCE), f"{name}_{'h' if out.dtype == torch.bfloat16 else 'f'}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out)]
    function(*pointers, *(ctypes.c_int64(n) for n in (*numbers, out.stride(0))))
