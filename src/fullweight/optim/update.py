"""The compiled passes of `update_kernels.cpp` over fp32 tensors of a CPU: AdamW's update and gradient norms.

One call takes all tensors of a step. Callers ask `compiled_for` first and use torch's operations for all else:
other devices and dtypes, tensors without data (a rehearsal) or with gaps, and machines without a C++ compiler.
AdamW's arithmetic is that of torch's fused kernel on whole vectors, bit for bit where torch was built with fused
multiply-adds; torch takes the last few entries of each thread in double instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.ops.native import load_library

SOURCE = Path(__file__).with_name("update_kernels.cpp")
OPTIONS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
BLOCK = 4096  # entries, as in the source


@dataclass(frozen=True)
class Moments:
    """One weight of a step, its gradient and its state; all fp32 and of one size."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    step: int  # this update's, from 1


def compiled_for(tensors: Iterable[Tensor]) -> bool:
    """Whether the kernels take these tensors, here."""
    return all(map(_fits, tensors)) and _library() is not None


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of each tensor, [count] fp32; squares are added in double, in an order that sizes alone decide."""
    out = torch.empty(len(tensors))
    blocks = torch.empty(sum(-(-t.numel() // BLOCK) for t in tensors), dtype=torch.float64)
    sizes = _numbers(ctypes.c_int64, [t.numel() for t in tensors])
    results = (ctypes.c_void_p(blocks.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    _run("norms_f", _addresses(tensors), sizes, *results, ctypes.c_int64(len(tensors)))
    return out


def adamw(
    moments: Sequence[Moments],
    *,
    scale: float,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update weights and moments in place by `scale` times their gradients, which stay as they are."""
    beta1, beta2 = betas
    factors = {
        step: (learning_rate / (1 - beta1**step), math.sqrt(1 - beta2**step)) for step in {m.step for m in moments}
    }
    rates, roots = zip(*(factors[m.step] for m in moments), strict=True)
    columns = zip(*((m.weight, m.gradient, m.first, m.second) for m in moments), strict=True)
    numbers = (scale, 1 - learning_rate * weight_decay, 1 - beta1, beta2, 1 - beta2, eps)
    written = [t for m in moments for t in (m.weight, m.first, m.second)]
    assert compiled_for(written), "callers ask first"
    _run(
        "adamw_f",
        *map(_addresses, columns),
        _numbers(ctypes.c_int64, [m.weight.numel() for m in moments]),
        _numbers(ctypes.c_float, rates),
        _numbers(ctypes.c_float, roots),
        ctypes.c_int64(len(moments)),
        *map(ctypes.c_float, numbers),
    )
    # what torch's operations in place do themselves: a graph that still needs the old values says so
    torch.autograd.graph.increment_version(written)


def _fits(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return load_library(SOURCE, *OPTIONS)
    except OperationError:  # no compiler: torch's passes, slower, not wrong
        return None


def _run(name: str, *arguments: object) -> None:
    getattr(_library(), name)(*arguments, ctypes.c_int(torch.get_num_threads()))


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _numbers(kind: Any, values: Sequence[float]) -> Any:
    return (kind * len(values))(*values)
