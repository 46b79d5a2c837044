"""Which rectangle of a sharded parameter lies on which rank.

A parameter is looked at as rows: `view(-1, columns)`, its last dimension across. A mesh axis may cut its first
dimension (so a range of rows) or its last (a range of columns); where two axes cut the first, as heads and then
FSDP do, the one that cut first has the larger pieces, whatever its place on the mesh. The ranks of one parameter
are numbered by their place on the axes that cut it.

Left out: cuts of dimensions between the first and the last, and cuts by more than one axis beside FSDP's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True)
class Piece:
    """Half-open ranges of rows and columns; either may be empty."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def size(self) -> int:
        return self.height * self.width

    def of(self, matrix: Tensor) -> Tensor:
        """The view of `matrix` [n, m] that this piece is."""
        return matrix[slice(*self.rows), slice(*self.columns)]

    def within(self, begin: int, end: int) -> Piece:
        """What of it lies in rows [begin, end), counted from `begin`."""
        low = min(max(self.rows[0], begin), end)
        return Piece((low - begin, max(min(self.rows[1], end), low) - begin), self.columns)

    def whole_matrices(self, rows: int, columns: int) -> tuple[int, int]:
        """The range of the stack's matrices, of so many rows and columns each, that lie in it whole."""
        if self.width < columns:
            return 0, 0
        return -(-self.rows[0] // rows), self.rows[1] // rows


@dataclass(frozen=True)
class Pieces:
    """How a parameter that stacks matrices lies on its ranks.

    `cut` are the indices of the matrices that no rank has whole, `group` the ranks among which those have to
    travel (None where none has to).
    """

    pieces: tuple[Piece, ...]  # by rank
    rank: int
    cut: tuple[int, ...] = ()
    group: dist.ProcessGroup | None = None


def unsupported(parameter: DTensor) -> bool:
    """Whether it is cut otherwise than by ranges of rows and columns."""
    ends = {0, parameter.dim() - 1}
    return any(not p.is_replicate() and getattr(p, "dim", None) not in ends for p in parameter.placements)


def pieces_of(parameter: Tensor, num_matrices: int) -> Pieces:
    """How `parameter`, a stack of so many matrices, lies on its ranks; may have to create a process group."""
    rows, columns = parameter.numel() // parameter.shape[-1] // num_matrices, parameter.shape[-1]
    axes = cutting_axes(parameter)
    if not axes:
        return Pieces((Piece((0, rows * num_matrices), (0, columns)),), 0)
    assert isinstance(parameter, DTensor)
    assert not unsupported(parameter), parameter.placements
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    sizes = [mesh.size(axis) for axis in axes]
    places = list(itertools.product(*(range(size) for size in sizes)))
    cuts = [parameter.placements[axis] for axis in axes]
    pieces = tuple(_piece(parameter.shape, cuts, sizes, place) for place in places)
    whole = {m for piece in pieces for m in range(*piece.whole_matrices(rows, columns))}
    cut = tuple(m for m in range(num_matrices) if m not in whole)
    rank = places.index(tuple(coordinate[axis] for axis in axes))
    return Pieces(pieces, rank, cut, cut_group(mesh, tuple(axes)) if cut else None)


def cutting_axes(parameter: Tensor) -> list[int]:
    """The mesh axes that cut it, in the mesh's order."""
    if not isinstance(parameter, DTensor):
        return []
    return [axis for axis, p in enumerate(parameter.placements) if not p.is_replicate()]


def cut_group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup:
    """The ranks that differ in `axes` alone, in the mesh's order; collective for two axes not yet flattened."""
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    names = mesh.mesh_dim_names
    assert names is not None
    return mesh[tuple(names[axis] for axis in axes)]._flatten().get_group()


def _piece(shape: torch.Size, cuts: Sequence[Placement], sizes: Sequence[int], place: tuple[int, ...]) -> Piece:
    ranges = {0: (0, shape[0]), len(shape) - 1: (0, shape[-1])}
    # a strided shard divides what the plain one left
    order = sorted(range(len(cuts)), key=lambda i: isinstance(cuts[i], _StridedShard))
    for i in order:
        dim: int = cuts[i].dim  # type: ignore[attr-defined]
        begin, end = ranges[dim]
        each = -(-(end - begin) // sizes[i])  # as torch.chunk: equal, the last ones shorter or empty
        ranges[dim] = min(begin + place[i] * each, end), min(begin + (place[i] + 1) * each, end)
    per_slice = shape[1:-1].numel()
    first, last = ranges[0]
    return Piece((first * per_slice, last * per_slice), ranges[len(shape) - 1])
