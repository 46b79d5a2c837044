"""A step's parameters in buckets of bounded size, which are updated one after the other.

What a step needs beside the state itself is then bounded by a bucket and not by the model: Muon's exchanges, and
the moments that `offload.py` has on the device. Buckets follow from shapes, placements and the order of the param
groups alone, so all ranks that share parameters have the same ones, whatever part each holds; that is what Muon's
collective exchange needs.

A part of a bucket is one bucket again: an optimiser that is given only that part takes it at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.optim.pieces import cutting_axes

BUCKET_BYTES = 1 << 28
"""Parameters of one bucket on the rank that holds most of them; one parameter may be larger."""


def buckets(groups: Iterable[dict[str, Any]]) -> list[list[tuple[dict[str, Any], Tensor]]]:
    """(param group, parameter) of all groups, in order; a bucket is at most BUCKET_BYTES, or one parameter."""
    found: list[list[tuple[dict[str, Any], Tensor]]] = []
    room = 0
    for group in groups:
        for parameter in group["params"]:
            size = largest_part_bytes(parameter)
            if not found or size > room:
                found.append([])
                room = BUCKET_BYTES
            found[-1].append((group, parameter))
            room -= size
    return found


def largest_part_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter on the rank that holds most of it."""
    shape = list(parameter.shape)
    for axis in cutting_axes(parameter):
        assert isinstance(parameter, DTensor)
        dim: int = parameter.placements[axis].dim  # type: ignore[attr-defined]
        shape[dim] = -(-shape[dim] // parameter.device_mesh.size(axis))
    entries = parameter.element_size()
    for size in shape:
        entries *= size
    return entries
