"""The operations of one pass on a CPU, all together. Imports no torch."""

from __future__ import annotations

from fullweight.planner.operations.attention import Attention
from fullweight.planner.operations.elementwise import Elementwise
from fullweight.planner.operations.experts import Experts
from fullweight.planner.operations.products import Products


class Operations(Products, Elementwise, Attention, Experts):
    """Sizes of activations are for `BF16` numbers unless they say otherwise."""
