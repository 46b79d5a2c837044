"""The hot operations behind one contract, chosen by name: one set for all, or another one for a group of them.

`reference` is plain torch and defines every operation; a device's set overrides what it can do faster. Asking
for a set that is absent, or for a group that it does not have, raises; "auto" takes the best set of the device.
What computes each group is recorded (`implementations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fullweight.core.config import nearest
from fullweight.core.errors import OperationError
from fullweight.devices import DEVICES
from fullweight.ops.ascend import AscendOperations
from fullweight.ops.cpu import CpuOperations
from fullweight.ops.cuda import CudaOperations
from fullweight.ops.groups import GROUPS, ComposedOperations
from fullweight.ops.native import find_compiler
from fullweight.ops.reference import ReferenceOperations, Workload

OPERATIONS: dict[str, type[ReferenceOperations]] = {
    "reference": ReferenceOperations,
    "cpu": CpuOperations,
    "cuda": CudaOperations,
    "ascend": AscendOperations,
}
"""But for the reference, which runs anywhere, a set has the name of the device that it is for."""


def available_operations(device: str = "cpu") -> list[str]:
    """Names that `resolve_operations` takes on this machine for tensors on `device` (a type), best last."""
    if device == "cpu" and not find_compiler():
        return ["reference"]
    return ["reference", *(name for name, kind in DEVICES.items() if kind.type == device and name in OPERATIONS)]


def resolve_operations(
    name: str = "auto",
    device: str = "cpu",
    chosen: Mapping[str, str] | None = None,
    workload: Workload | None = None,
) -> ReferenceOperations:
    """The operations called `name`, or for "auto" the best ones for tensors on `device` (a device type).

    `chosen` names another set for some groups. With "auto", groups whose `workload` the set does not take are the
    reference's. Raises OperationError when operations are absent on this machine, not made for the device, or have
    nothing of their own for a group that names them.
    """
    base = OPERATIONS[_known(name, device)]()
    parts: dict[str, ReferenceOperations] = {}
    if name == "auto" and workload is not None:
        parts = {group: ReferenceOperations() for group in GROUPS if not base.takes(group, workload)}
    for group, other in (chosen or {}).items():
        if group not in GROUPS:
            raise OperationError(f"no group of operations named {group!r}; {nearest(group, list(GROUPS))}")
        part = OPERATIONS[_known(other, device)].for_group(group)
        if part.name != "reference" and other != "auto" and not part.has_own(group):
            raise OperationError(
                f'ops.{group}: the {part.name} operations have none of their own; use "reference" or leave it out'
            )
        parts[group] = part
    return ComposedOperations(base, parts) if parts else base


def implementations(operations: ReferenceOperations) -> dict[str, str]:
    """Which set computes each group: the set's name where it has its own, otherwise "reference"."""
    parts = {group: operations.part(group) for group in GROUPS}
    return {group: part.name if part.has_own(group) else "reference" for group, part in parts.items()}


def torch_alone(names: Iterable[str]) -> list[str]:
    """Those of the named sets that are made for a device and take any tensors: traced anywhere."""
    return [name for name in names if name in OPERATIONS and OPERATIONS[name].torch_alone]


def _known(name: str, device: str) -> str:
    if name not in ("auto", *OPERATIONS):
        raise OperationError(f"no operations named {name!r}; {nearest(name, ['auto', *OPERATIONS])}")
    if name == "auto":
        return available_operations(device)[-1]
    if name in DEVICES and DEVICES[name].type != device:
        raise OperationError(f"the {name} operations do not run on {device}; use 'auto' or 'reference'")
    return name
