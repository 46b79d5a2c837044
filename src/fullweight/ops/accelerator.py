"""What the sets of operations for accelerators share: projections that keep no cast weight, grouped experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fullweight.ops.late import split
from fullweight.ops.linear import CastLinear, GroupedLinear, WideLinear
from fullweight.ops.mixture import ExpertMixture, GroupedProducts
from fullweight.ops.reference import ReferenceOperations


class AcceleratorOperations(ReferenceOperations, ABC):
    """Each set brings its grouped products, and says which types they take."""

    products: ClassVar[type[GroupedProducts]]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return CastLinear.apply(x, *split(x, weight))

    def wide_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return WideLinear.apply(x, *split(x, weight), F.linear)

    def grouped_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return GroupedLinear.apply(x, *split(x, weight))

    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        if not chosen.numel():  # no row is here, and which products take none is not documented
            return super().experts(x, chosen, weights, gate_up, down, limit)
        self.check_experts(x)
        (gate_up, late_gate_up), (down, late_down) = split(x, gate_up), split(x, down)
        kit = self.products()
        return ExpertMixture.apply(x, chosen, weights, gate_up, down, limit, late_gate_up, late_down, kit)

    @abstractmethod
    def check_experts(self, x: Tensor) -> None:
        """Raise OperationError when the grouped products do not take x's type."""
