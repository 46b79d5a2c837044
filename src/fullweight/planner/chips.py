"""The table of accelerators, by name: what rehearsal and planning measure a layout against.

The figures are in `chips.toml`, each with a status (measured, stated, derived) and a source. A file of one's own
adds chips, or clusters of a known chip with other links, by the same keys; `base` names the entry that it changes.
Imports no torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fullweight.core.config import Config, nearest, read_toml
from fullweight.core.errors import ConfigError
from fullweight.planner.operations import OF_MAKERS

_GIB = 2**30
_STATUSES = ("measured", "stated", "derived")


class Provenance(NamedTuple):
    """Where a figure comes from."""

    status: str
    source: str


class Link(Config):
    """The links that join `ranks` devices (0: all of the cluster)."""

    name: str
    ranks: NonNegativeInt
    bandwidth: PositiveFloat = Field(description="1e9 bytes/s a device, one direction")
    latency_us: NonNegativeFloat


class Chip(Config):
    """One rank's device; `name` is its key in the table."""

    name: str
    aliases: tuple[str, ...] = ()
    device: Literal["die", "gpu"]
    dies_per_chip: PositiveInt
    peaks: dict[str, PositiveFloat] = Field(description="dense peak of one rank's device by type, 1e12 FLOP/s")
    memory_gb: PositiveFloat = Field(description="memory of one rank's device, 2^30 bytes")
    memory_bandwidth: PositiveFloat = Field(description="1e9 bytes/s")
    ranks_per_node: PositiveInt
    reserved_gb: NonNegativeFloat = Field(description="taken by the runtime before the first tensor, 2^30 bytes")
    buffer_gb_per_group: NonNegativeFloat = Field(description="taken by the communication library for each group")
    power_w: PositiveFloat = Field(description="of the device")
    system_w: PositiveFloat = Field(description="its share of the whole machine")
    links: tuple[Link, ...] = Field(min_length=1, description="nearest first")
    provenance: dict[str, Provenance] = Field({}, description="status and source of each figure, by its path")

    @property
    def maker(self) -> str:
        """Whose device it is."""
        return "Ascend" if self.name.startswith("ascend") or self.device == "die" else "NVIDIA"

    @property
    def operations(self) -> str:
        """The set of operations that a step's memory is counted with: its maker's."""
        return OF_MAKERS[self.maker]

    @property
    def bf16_tflops(self) -> float:
        return self.peaks["bf16"]

    def usable_bytes(self, num_groups: int) -> int:
        """What is left for tensors on a rank that is in so many process groups."""
        return int((self.memory_gb - self.reserved_gb - num_groups * self.buffer_gb_per_group) * _GIB)

    def link(self, span: int) -> Link:
        """The nearest links that join `span` consecutive ranks."""
        for link in self.links:
            if link.ranks == 0 or span <= link.ranks:
                return link
        return self.links[-1]


def chip(name: str, extra: Path | None = None) -> Chip:
    """The chip of that name, from the table or the file `extra`; raises ConfigError with the nearest name."""
    table = _table(extra)
    names = {alias: key for key, entry in table.items() for alias in (key, *entry.get("aliases", ()))}
    if name not in names:
        raise ConfigError(f"unknown chip {name!r}; {nearest(name, list(names), 3)}")
    source = "chips.toml" if extra is None else str(extra)
    return _resolved(names[name], table, source)


def chip_names(extra: Path | None = None) -> list[str]:
    """All names, in the table's order."""
    return list(_table(extra))


def _resolved(name: str, table: Mapping[str, dict[str, Any]], source: str) -> Chip:
    provenance: dict[str, Provenance] = {}
    values = _values(_inherited(name, table, source), "", provenance, f"{source} [{name}]")
    made: Chip = Chip.resolve({"name": name, **values, "provenance": provenance}, f"{source} [{name}]")
    if "bf16" not in made.peaks:
        raise ConfigError(f"{source} [{name}] peaks has no bf16; give its dense BF16 peak in 1e12 FLOP/s")
    return made


def _inherited(name: str, table: Mapping[str, dict[str, Any]], source: str) -> dict[str, Any]:
    """The entry over those it is based on."""
    entry, chain = dict(table[name]), [name]
    while (base := entry.pop("base", None)) is not None:
        if base in chain:
            raise ConfigError(
                f"{source} [{name}] base {base!r} leads back to itself; name a chip that is complete"
            )
        if base not in table:
            raise ConfigError(f"{source} [{name}] base {base!r} is unknown; {nearest(base, list(table))}")
        chain.append(base)
        entry = {**table[base], "aliases": (), **entry}
    return entry


def _values(value: Any, path: str, provenance: dict[str, Provenance], where: str) -> Any:
    """`value` with every [number, status, source] made a number, and what it said written down."""
    if isinstance(value, dict):
        return {k: _values(v, f"{path}.{k}" if path else k, provenance, where) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) == 3 and isinstance(value[0], int | float) and not isinstance(value[1], int | float | dict):
        if value[1] not in _STATUSES:
            raise ConfigError(
                f"{where} {path} has status {value[1]!r}; expected [value, status, source] with status "
                f"{', '.join(_STATUSES)}"
            )
        provenance[path] = Provenance(str(value[1]), str(value[2]))
        return value[0]
    return [_values(v, f"{path}.{i}", provenance, where) for i, v in enumerate(value)]


def _table(extra: Path | None) -> dict[str, dict[str, Any]]:
    text = resources.files("fullweight.planner").joinpath("chips.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    sources = table.pop("sources")
    added = {} if extra is None else read_toml(extra, "chip file")
    added.pop("sources", None)
    for name, entry in added.items():
        if not isinstance(entry, dict):
            raise ConfigError(
                f"{extra}: {name} is no chip; a chip is a section [name] with the keys of chips.toml"
            )
    return _spelt(table, sources) | added


def _spelt(value: Any, sources: Mapping[str, str]) -> Any:
    """The table with each source's key replaced by the words for it."""
    if isinstance(value, dict):
        return {k: _spelt(v, sources) for k, v in value.items()}
    if isinstance(value, list):
        if len(value) == 3 and value[1] in _STATUSES:
            return [value[0], value[1], sources[value[2]]]
        return [_spelt(v, sources) for v in value]
    return value
