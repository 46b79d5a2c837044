"""Memory for large tensors on a CPU: kept for reuse, in a range of its own.

Three defaults cost a training step most of its speed or half as much memory again: glibc gives a large block
back at every free, so that the next one pays for fresh zeroed pages; when it is told not to, small lasting
objects settle in the holes of its heap, which then grows; and oneDNN keeps up to 1,024 prepared products.
`prepare_memory` changes all three for the process, once. FULLWEIGHT_CPU_ALLOCATOR=system leaves torch's allocator.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fullweight.core.errors import OperationError
from fullweight.ops.native import load_library

SOURCE = Path(__file__).with_name("kernels") / "allocator.cpp"
SWITCH = "FULLWEIGHT_CPU_ALLOCATOR"
PREPARED_PRODUCTS = 384  # a step meets about 150 shapes, rows of documents change some; about 0.35 MB each


@dataclass(frozen=True)
class LargeBlocks:
    """Bytes of large tensors in use, and the most that their address range ever spanned."""

    in_use: int
    most: int


@functools.cache
def prepare_memory() -> bool:
    """Keep freed memory for reuse from now on; True where large tensors have a range of their own.

    That needs Linux, a C++ compiler and address space to reserve; without them glibc's heap serves.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PREPARED_PRODUCTS))
    _keep_freed_blocks()
    library = _library()
    return library is not None and library.install() == 1


def large_blocks() -> LargeBlocks | None:
    """What the range holds; None where there is none."""
    library = _library() if prepare_memory() else None
    if library is None:
        return None
    in_use, most = ctypes.c_uint64(), ctypes.c_uint64()
    library.usage(ctypes.byref(in_use), ctypes.byref(most))
    return LargeBlocks(in_use.value, most.value)


@functools.cache
def _library() -> ctypes.CDLL | None:
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "system"):
        raise OperationError(f"${SWITCH} is {switch!r}; expected auto or system")
    if sys.platform != "linux" or switch == "system":
        return None
    root = Path(torch.__path__[0])
    try:
        return load_library(SOURCE, "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10")
    except OperationError:  # torch without headers, an older compiler: slower, not wrong
        return None


def _keep_freed_blocks() -> None:
    """Tell glibc not to give large blocks back: oneDNN takes its scratch from there."""
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 64 << 20)):
        mallopt(option, value)
