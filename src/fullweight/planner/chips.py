"""The table of accelerators, by name: what rehearsal and planning measure a layout against.

The figures are in `chips.toml`, with their units and where they come from. Imports no torch.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fullweight.core.config import Config, nearest
from fullweight.core.errors import ConfigError

_GIB = 2**30


class Chip(Config):
    """One rank's device; `name` is its key in the table."""

    name: str
    device: Literal["die", "gpu"]
    dies_per_chip: PositiveInt
    bf16_tflops: PositiveFloat = Field(description="dense peak of one rank's device, 1e12 FLOP/s")
    memory_gb: PositiveFloat = Field(description="memory of one rank's device, 2^30 bytes")
    memory_bandwidth: PositiveFloat = Field(description="1e9 bytes/s")
    scale_up_bandwidth: PositiveFloat = Field(description="1e9 bytes/s a device, one direction")
    scale_up_ranks: PositiveInt = Field(description="ranks that the fast links join")
    scale_out_bandwidth: PositiveFloat = Field(description="1e9 bytes/s a device, one direction")
    ranks_per_node: PositiveInt
    reserved_gb: float = Field(ge=0, description="taken by the runtime before the first tensor, 2^30 bytes")
    buffer_gb_per_group: float = Field(ge=0, description="taken by the communication library for each group")

    def usable_bytes(self, num_groups: int) -> int:
        """What is left for tensors on a rank that is in so many process groups."""
        return int((self.memory_gb - self.reserved_gb - num_groups * self.buffer_gb_per_group) * _GIB)


def chip(name: str) -> Chip:
    """The chip of that name; raises ConfigError with the nearest name, or all."""
    table = _table()
    if name not in table:
        raise ConfigError(f"unknown chip {name!r}; {nearest(name, list(table))}")
    return Chip.resolve({"name": name, **table[name]}, f"chips.toml [{name}]")


def chip_names() -> list[str]:
    """All names, in the table's order."""
    return list(_table())


def _table() -> dict[str, dict[str, object]]:
    text = resources.files("fullweight.planner").joinpath("chips.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
