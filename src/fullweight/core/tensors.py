"""A rank's own part of a tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, whose gradient autograd passes on; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
