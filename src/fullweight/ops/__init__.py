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


def available_operations() -> list[str]:
    """Names that `resolve_operations` takes on this machine, best last."""
    return ["reference", "cpu"] if find_compiler() else ["reference"]


def resolve_operations(name: str) -> ReferenceOperations:
    """The operations called `name`, or the best ones here for "auto"; raises OperationError when absent."""
    if name == "auto":
        name = available_operations()[-1]
    if name not in OPERATIONS:
        raise OperationError(f"no operations named {name!r}; {nearest(name, ['auto', *OPERATIONS])}")
    return OPERATIONS[name]()
