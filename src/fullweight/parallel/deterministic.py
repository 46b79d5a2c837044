"""Deterministic mode: the same layout gives the same bits.

On a CPU every operation here repeats bit for bit anyway, and so do the exchanges between ranks, which add in rank
order. On an accelerator some of torch's operations add in the order in which threads finish; in this mode torch
takes the ordered ones instead, which are slower, and raises where it has none. Another layout adds in another
order: equal to rounding, not to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, if `on`, torch uses only operations that repeat bit for bit; as before afterwards."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a device
    aids: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), aids.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    aids.fill_uninitialized_memory = False  # it would write every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        aids.fill_uninitialized_memory = filled
