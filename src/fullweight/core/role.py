"""How a parameter is optimised: said by the model, read by optimisers and the planner. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParameterRole:
    """How a parameter is optimised.

    A `muon` parameter is `num_matrices` independent matrices of equal shape stacked along its leading
    dimensions: `parameter.view(num_matrices, -1, parameter.shape[-1])`.
    """

    optimizer: Literal["muon", "adamw"]
    num_matrices: int = 1
    weight_decay: bool = True
