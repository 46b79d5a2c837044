"""Which links each axis of a layout uses: ranks are counted with tensor fastest and pipeline slowest.

So tensor ranks are neighbours, then come context and data ranks, and experts lie on consecutive ranks of a stage.
An axis uses the nearest links that join the whole span of ranks that one of its groups covers; an expert exchange
that is wider than the nearest fast links sends a part of each token beyond them. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fullweight.planner.chips import Chip, Link
from fullweight.planner.job import Job


@dataclass(frozen=True)
class Placement:
    """An axis of `size` ranks whose groups span `span` consecutive ranks, and the links between them."""

    axis: str
    size: int
    span: int
    link: Link


def placements(job: Job) -> list[Placement]:
    """Every axis above 1, nearest first."""
    stage = job.ranks // job.pipeline
    sizes = {
        "tensor": (job.tensor, job.tensor),
        "context": (job.context, job.tensor * job.context),
        "expert": (job.expert, job.expert),
        "data": (job.data, stage),
        "pipeline": (job.pipeline, job.ranks),
    }
    return [Placement(axis, size, span, job.chip.link(span)) for axis, (size, span) in sizes.items() if size > 1]


def near_ranks(chip: Chip, span: int) -> int:
    """Ranks of a span that the fast links (all but the last kind) join directly."""
    fast = [link.ranks for link in chip.links if link.ranks]
    return min(span, max(fast, default=1))


def expert_routes(chip: Chip, expert: int, top_k: int, *, grouped: bool = True) -> tuple[float, float]:
    """(copies of a token that stay on fast links, that leave them).

    `grouped`: once to each group of near ranks, and there once to each rank; else one for each expert. With
    uniform routing a token's K experts lie on G (1 - (1 - 1/G)^K) of G groups in the mean.
    """
    if expert <= 1 or top_k == 0:
        return 0.0, 0.0
    near = near_ranks(chip, expert)
    if not grouped:
        return top_k * (near - 1) / expert, top_k * (expert - near) / expert
    groups = -(-expert // near)
    reached = groups * (1 - (1 - 1 / groups) ** top_k)
    away = reached * (groups - 1) / groups if groups > 1 else 0.0
    on = near * (1 - (1 - 1 / near) ** (top_k / groups)) if near > 1 else 0.0
    return on * groups * (near - 1) / near, away
