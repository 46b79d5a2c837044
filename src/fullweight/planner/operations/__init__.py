"""What each operation of the model makes, keeps and takes, in bytes, without its arithmetic.

A class for a device's set; what differs between sets is a method of the same name.

`cpu` is `ops/cpu` and `ops/linear.py`; `ascend` is `ops/ascend`, and `ops/reference.py` where it has no operator.
Imports no torch.
"""

from __future__ import annotations

from fullweight.planner.operations.ascend import AscendOperations
from fullweight.planner.operations.base import BF16, FP32, INT32, INT64
from fullweight.planner.operations.cpu import Operations
from fullweight.planner.operations.experts import rounded_rows

SETS: dict[str, type[Operations]] = {"cpu": Operations, "ascend": AscendOperations}
"""Sets of operations that a step is replayed with."""

__all__ = ["BF16", "FP32", "INT32", "INT64", "SETS", "AscendOperations", "Operations", "rounded_rows"]
