"""What a rehearsal says: one record per role, plain data for the terminal, JSON and the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExchangeCount:
    """`count` collectives of `kind` among the ranks of one axis; `num_bytes` is what this rank gives in all."""

    axis: str
    axis_size: int
    kind: str
    module: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Curve:
    """Bytes by category at chosen moments (counts of operations)."""

    moments: list[int]
    by_category: dict[str, list[int]]


@dataclass(frozen=True)
class RoleResult:
    """One training step of one rank."""

    role: str
    rank: int
    coordinates: dict[str, int]
    num_ranks: int  # that have this role
    num_parameters: int  # on this rank, its shards
    peak_bytes: int
    peak_by_category: dict[str, int]
    peak_moment: int
    peak_module: str
    most_by_category: dict[str, int]  # each category at its own worst moment
    flops_by_operation: dict[str, int]  # of the whole step, as the exchanges
    exchanges: list[ExchangeCount]
    num_groups: int  # process groups that this rank is in
    num_operations: int
    trace_seconds: float
    tracer_rss_bytes: int
    timeline: Curve


@dataclass(frozen=True)
class Rehearsal:
    """A layout against a chip, over all distinct roles."""

    recipe: str
    layout: dict[str, int]
    num_ranks: int
    chip: str
    usable_bytes: dict[str, int]  # by role
    memory_bytes: int  # of the chip's device
    routing: str
    rows_per_rank: int
    rows_traced: int  # of them; memory is of these, counts are of all
    row_tokens: int
    operations: str  # the set of operations that was traced, in words
    of_the_chip: bool  # whether they are those that the chip runs
    roles: list[RoleResult] = field(default_factory=list)

    def fits(self, role: RoleResult) -> bool:
        """Whether the peak stays within what the chip leaves for tensors."""
        return role.peak_bytes <= self.usable_bytes[role.role]

    @property
    def all_fit(self) -> bool:
        return all(self.fits(role) for role in self.roles)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        for role, record in zip(self.roles, values["roles"], strict=True):
            record["fits"] = self.fits(role)
        return values | {"all_fit": self.all_fit, "kind": "projection: traced with fake tensors, nothing ran"}
