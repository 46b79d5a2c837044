"""The hot operations behind one contract, chosen by name.

`reference` is plain torch and defines every operation; a device's set overrides what it can do faster. Asking
for a set that is absent raises; "auto" takes the best set of the default device and the choice is recorded.
"""

from __future__ import annotations

from fullweight.core.config import nearest
from fullweight.core.errors import OperationError
from fullweight.ops.reference import ReferenceOperations


def available_operations() -> list[str]:
    """Names that `resolve_operations` takes on this machine, best last."""
    return ["reference"]


def resolve_operations(name: str) -> ReferenceOperations:
    """The operations called `name`, or the best ones for "auto"; raises OperationError when absent."""
    if name in ("auto", "reference"):
        return ReferenceOperations()
    raise OperationError(f"no operations named {name!r} here; {nearest(name, available_operations())}")
