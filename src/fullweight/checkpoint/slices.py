"""Which part of a tensor a process holds: what streamed reading, writing and drawing of weights have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Slice:
    """The part of one of our tensors that this process holds: `tensor` begins at `offset` of a whole [`shape`]."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(target: Tensor) -> Slice:
        """All of a plain tensor, or what this rank holds of a DTensor."""
        if not isinstance(target, DTensor):
            return Slice(target, (0,) * target.dim(), tuple(target.shape))
        local, shape = target.to_local(), tuple(target.shape)
        chunks = target.__create_chunk_list__()
        assert len(chunks) <= 1, "a rank's part is one block"
        offset = tuple(chunks[0].offsets) if chunks and local.numel() else (0,) * len(shape)
        return Slice(local, offset, shape)
