"""The hot operations behind one contract, chosen by name.

`reference` is plain torch and defines every operation; a device's set overrides what it can do faster. Asking
for a set that is absent raises; "auto" takes the best set present, and what was taken is recorded by its name.
"""

from __future__ import annotations

from fullweight.core.config import nearest
from fullweight.core.errors import OperationError
from fullweight.ops.cpu import CpuOperations
from fullweight.ops.native import find_compiler
from fullweight.ops.reference import ReferenceOperations

OPERATIONS: dict[str, type[ReferenceOperations]] = {"reference": ReferenceOperations, "cpu": CpuOperations}


def available_operations(device: str = "cpu") -> list[str]:
    """Names that `resolve_operations` takes on this machine for tensors on `device`, best last."""
    return ["reference", "cpu"] if device == "cpu" and find_compiler() else ["reference"]


def resolve_operations(name: str, device: str = "cpu") -> ReferenceOperations:
    """The operations called `name`, or for "auto" the best ones for tensors on `device` (a device type).

    Raises OperationError when they are absent on this machine or not made for the device.
    """
    if name not in ("auto", *OPERATIONS):
        raise OperationError(f"no operations named {name!r}; {nearest(name, ['auto', *OPERATIONS])}")
    if name == "auto":
        name = available_operations(device)[-1]
    elif name == "cpu" and device != "cpu":
        raise OperationError(f"the cpu operations do not run on {device}; use 'auto' or 'reference'")
    return OPERATIONS[name]()
