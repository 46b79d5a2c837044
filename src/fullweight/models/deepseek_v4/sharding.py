"""Which parameters may be cut over ranks that compute together, and along which dimension: data, no ranks.

Expert parallelism deals whole experts. Tensor parallelism deals heads of the attention: its query rows,
and the output projection's groups with their columns. Everything else is whole wherever it is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cut:
    """The mesh axis that a parameter is cut over, in equal parts along `dim`."""

    axis: Literal["expert", "tensor"]
    dim: int


_CUTS = (
    (re.compile(r"\.ffn\.experts\.(gate_up|down)$"), Cut("expert", 0)),
    (re.compile(r"\.attn\.(wq_b|wo_a)\.weight$"), Cut("tensor", 0)),
    (re.compile(r"\.attn\.wo_b\.weight$"), Cut("tensor", 1)),
)


def cut_of(name: str) -> Cut | None:
    """How the parameter of this name is cut; None when it never is."""
    return next((cut for pattern, cut in _CUTS if pattern.search(name)), None)
