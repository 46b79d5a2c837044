"""A whole rehearsal: which ranks differ, each traced in a process of its own, and the chip they are held against.

Ranks of one pipeline stage and one slice of the row do the same work on tensors of the same sizes, so one of them
is traced: of the ranks that share parameters unevenly, the first, which holds most. With context parallelism a
stage's first and last slice stand for all (the last sees most entries); tensor ranks of one span differ only in a
few rows of the indexer, and the last stands for them.

A pipeline with one stage on each rank holds most once as many micro-batches are in flight as it has ranks and
gradients of one before them are there; more of the same repeat it, so one more than ranks are traced. Schedules
with several stages on a rank keep what they send until the step ends, so all are traced for them. Counts of
collectives and FLOPs are those of the whole step (`role.of_step`).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from fullweight.core.config import nearest
from fullweight.core.errors import ConfigError
from fullweight.devices import DEVICES
from fullweight.ops import torch_alone
from fullweight.parallel.config import Layout
from fullweight.planner.chips import Chip
from fullweight.rehearse.result import Rehearsal, RoleResult
from fullweight.rehearse.role import Assignment, trace
from fullweight.rehearse.routing import Routing
from fullweight.train.config import RunConfig


@dataclass(frozen=True)
class Role:
    """Ranks that do the same; `rank` is the one that is traced."""

    name: str
    rank: int
    num_ranks: int


def roles_of(layout: Layout) -> list[Role]:
    """The distinct roles, in the order of their ranks.

    >>> [(r.name, r.rank) for r in roles_of(Layout(pipeline=2, shard=4))]
    [('stage 0', 0), ('stage 1', 4)]
    """
    roles = []
    per_stage = layout.replicate * layout.dense
    for stage in range(layout.pipeline):
        name = f"stage {stage}" if layout.pipeline > 1 else "all ranks"
        last = layout.num_slices - 1
        if layout.context == 1:
            roles.append(Role(name, stage * per_stage + last, per_stage))
            continue
        alike = per_stage // layout.num_slices * layout.tensor
        roles.append(Role(f"{name}, first slice", stage * per_stage, alike))
        roles.append(Role(f"{name}, last slice", stage * per_stage + last, per_stage - alike))
    return roles


def rehearse(
    config: RunConfig,
    source: str,
    num_ranks: int,
    chip: Chip,
    routing: Routing,
    *,
    micro_batches: int | None = None,
    device: str = "cpu",
    roles: Collection[str] = (),
    processes: int = 1,
    done: Callable[[RoleResult], None] = lambda _: None,
) -> Rehearsal:
    """Trace every role, or those named by `roles`; `done` is told each result as it comes.

    Raises ConfigError for what cannot be laid out, and for a role that there is not.
    """
    layout = config.layout(num_ranks)
    rows = config.train.rows_per_step // layout.data_size
    traced = micro_batches_traced(config, layout, rows, micro_batches)
    assignments = [
        Assignment(config, role.name, role.rank, num_ranks, role.num_ranks, traced, rows, routing, device)
        for role in chosen_roles(layout, roles)
    ]
    results: dict[str, RoleResult] = {}
    for result in _traced(assignments, processes):
        results[result.role] = result
        done(result)
    ordered = [results[assignment.role] for assignment in assignments]
    return Rehearsal(
        recipe=source,
        layout=layout.axes(),
        num_ranks=num_ranks,
        chip=chip.name,
        usable_bytes={role.role: chip.usable_bytes(role.num_groups) for role in ordered},
        memory_bytes=chip.usable_bytes(0),
        routing=str(routing),
        rows_per_rank=rows,
        rows_traced=traced,
        row_tokens=config.data.row_tokens,
        operations=_operations(config, device),
        of_the_chip=_of_the_chip(config, device, chip),
        roles=ordered,
    )


def _operations(config: RunConfig, device: str) -> str:
    """Which operations were traced, in words."""
    if device == "cpu" and torch_alone([config.ops.default]):
        return f"those called {config.ops.default}, whose kernels hold less than the formulas that were traced"
    if device == "cpu":
        return "those of the CPU, their kernels left out"
    named = ", ".join([config.ops.default, *(f"{group}={name}" for group, name in config.ops.chosen.items())])
    return f"{named}, on {device}"


def _of_the_chip(config: RunConfig, device: str, chip: Chip) -> bool:
    """Whether what was traced is what the chip runs: its maker's operations, on that device where they need it."""
    if device == "cpu" and torch_alone([config.ops.default]):
        return chip.maker != "Ascend"
    traced = next(name for name, kind in DEVICES.items() if device in (name, kind.type))
    if traced == "cpu" or (traced == "ascend") != (chip.maker == "Ascend"):
        return False
    return config.ops.default in ("auto", traced)


def chosen_roles(layout: Layout, names: Collection[str]) -> list[Role]:
    """The roles of these names, all when there are none. Raises ConfigError."""
    known = {role.name: role for role in roles_of(layout)}
    for name in names:
        if name not in known:
            raise ConfigError(f"this layout has no role {name!r}; {nearest(name, list(known))}")
    return [role for name, role in known.items() if not names or name in names]


def micro_batches_traced(config: RunConfig, layout: Layout, rows: int, asked: int | None = None) -> int:
    """How many of a step's `rows` are traced: as many as asked for, or as show the peak. Raises ConfigError."""
    enough = rows if config.parallel.virtual_stages > 1 else min(rows, layout.pipeline + 1)
    if asked is None:
        return enough
    if not enough <= asked <= rows:
        raise ConfigError(
            f"--micro-batches {asked}: a step of this recipe has {rows} on each data rank, and {enough} of them "
            f"show its peak and what each adds; choose from {enough} to {rows}, or leave it out"
        )
    return asked


def _traced(assignments: list[Assignment], processes: int) -> Iterator[RoleResult]:
    """Results as they come; a process traces one role and ends, which gives all its memory back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(assignments)), context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(trace, assignment) for assignment in assignments]):
            yield future.result()
