"""The two holders of weights that every block uses. Weights are fp32 masters, cast where they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullweight.ops.reference import ReferenceOperations


class Projection(nn.Module):
    """A matrix [out, in] without bias; `groups` > 1 makes it block-diagonal over [T, groups, in]."""

    def __init__(self, ops: ReferenceOperations, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.ops, self.groups = ops, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return self.ops.grouped_linear(x, self.weight)
        return self.ops.linear(x, self.weight)


class Norm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, ops: ReferenceOperations, width: int, eps: float) -> None:
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
