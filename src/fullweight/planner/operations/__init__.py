"""What each operation of the model makes, keeps and takes, in bytes, without its arithmetic.

A class for a device's set; what differs between sets is a method of the same name.

`cpu` is `ops/cpu` and `ops/linear.py`; `ascend` is `ops/ascend` and `cuda` is `ops/cuda.py`, and both are
`ops/reference.py` where they have nothing of their own.
Imports no torch.
"""

from __future__ import annotations

from fullweight.planner.operations.ascend import AscendOperations
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64
from fullweight.planner.operations.cpu import Operations
from fullweight.planner.operations.cuda import CudaOperations
from fullweight.planner.operations.experts import rounded_rows

SETS: dict[str, type[Operations]] = {"cpu": Operations, "ascend": AscendOperations, "cuda": CudaOperations}
"""Sets of operations that a step is replayed with."""

OF_MAKERS = {"Ascend": "ascend", "NVIDIA": "cuda"}
"""The set that chips of a maker run."""

__all__ = ["BF16", "FP32", "INT32", "INT64", "OF_MAKERS", "SETS", "Operations", "rounded_rows"]
