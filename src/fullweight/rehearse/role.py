"""One role of a layout, traced: the run's own model, sharding, schedule and optimisers, without data."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.distributed.device_mesh import DeviceMesh

from fullweight.core.errors import ConfigError
from fullweight.core.types import Batch, CompressionTable, PackedLayout
from fullweight.devices import DEVICES
from fullweight.models.deepseek_v4.moe import Experts
from fullweight.ops import torch_alone
from fullweight.ops.cpu.experts import rounded_rows
from fullweight.ops.cpu.sizes import Sizes, replaced
from fullweight.parallel.config import Layout
from fullweight.parallel.engine import micro_batch
from fullweight.parallel.expert import ExpertExchange
from fullweight.parallel.mesh import Meshes
from fullweight.rehearse.fake import device_of, fake_ranks, reading_ones, without_data
from fullweight.rehearse.memory import CATEGORIES, Category
from fullweight.rehearse.result import Curve, ExchangeCount, RoleResult
from fullweight.rehearse.routing import Routing
from fullweight.rehearse.sizes_only import SizesOnly
from fullweight.rehearse.step import traced_step
from fullweight.rehearse.tracer import BETWEEN_STAGES, Exchange, Pass, Tracer
from fullweight.train.assemble import parts_of, plan_model
from fullweight.train.config import RunConfig

_CURVE_POINTS = 600
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Assignment:
    """What one process traces: one rank's step, of whose `rows` it passes `micro_batches` through the model."""

    config: RunConfig
    role: str
    rank: int
    num_ranks: int
    ranks_alike: int
    micro_batches: int
    rows: int
    routing: Routing
    device: str = "cpu"

    @property
    def operations_for(self) -> str | None:
        """Whose operations are traced, where some are named that take a CPU's tensors too."""
        asked = torch_alone([self.config.ops.default, *self.config.ops.chosen.values()])
        return DEVICES[asked[0]].type if self.device == "cpu" and asked else None


@dataclass(frozen=True)
class Answers:
    """What tensors without values cannot say: sizes inside operations, and rows that experts exchange."""

    sizes: Sizes
    exchange: Callable[[ExpertExchange], ExpertExchange]


def expected_answers(assignment: Assignment, layout: Layout) -> Answers:
    """One document as long as the row, and experts as loaded as the routing says."""
    sizes = _Expected(layout, assignment.rank, assignment.config.data.row_tokens)
    most = most_rows(assignment.config, layout, assignment.rank)
    return Answers(sizes, partial(_ExpectedExchange, routing=assignment.routing, most=most))


def trace(assignment: Assignment, answers: Answers | None = None) -> RoleResult:
    """Trace it in this process, which must not be in a process group.

    `answers` gives the sizes that values decide, in place of those that the row and the routing suggest.
    """
    began = time.perf_counter()
    config = assignment.config
    layout = config.layout(assignment.num_ranks)
    answers = answers or expected_answers(assignment, layout)
    architecture = config.model.architecture()
    row = full_row(config.data.row_tokens, architecture.ratios)
    with fake_ranks(assignment.rank, layout, device_of(assignment.device)) as ranks:
        names = axis_names(ranks.meshes)
        tracer = Tracer({group: axis for group, (axis, _) in names.items()})
        plan = plan_model(config, ranks, architecture, assignment.operations_for)
        with (
            SizesOnly(ranks.device) as mode,
            reading_ones(),
            replaced(answers.sizes),
        ):
            made = parts_of(plan, config, ranks)
            for module in made.model.modules():
                if isinstance(module, Experts) and isinstance(module.dispatch, ExpertExchange):
                    module.dispatch = answers.exchange(module.dispatch)
            batches = [without_data(row, mode).to(ranks.device) for _ in range(assignment.micro_batches)]
            try:
                traced_step(config, ranks, made, batches, tracer)
            except DynamicOutputShapeException as error:
                raise ConfigError(
                    f"operations {plan.model.ops.name!r}: {error} makes as much as its values say, and a "
                    "rehearsal has none; trace others (--ops)"
                ) from None
    return summarise(assignment, tracer, dict(names.values()), time.perf_counter() - began)


def full_row(num_tokens: int, ratios: tuple[int, ...]) -> Batch:
    """One document as long as the row: the most entries that a token can see."""
    layout = PackedLayout.build([num_tokens], ratios)
    return Batch(torch.zeros(num_tokens, dtype=torch.int64), torch.ones(num_tokens), layout, ("rehearsal",))


def axis_names(meshes: Meshes | None) -> dict[str, tuple[str, int]]:
    """(axis, its size) by the name of the process group."""
    names: dict[str, tuple[str, int]] = {}
    for axis in ("dense", "tensor", "heads", "expert", "experts", "slices", "context", "pipeline"):
        mesh: DeviceMesh | None = getattr(meshes, axis, None)
        if mesh is None:
            continue
        for dim in range(mesh.ndim):
            label = "replicate" if mesh.ndim == 2 and dim == 0 else axis
            names.setdefault(mesh.get_group(dim).group_name, (label, mesh.size(dim)))
    world = torch.distributed.group.WORLD
    assert world is not None
    names.setdefault(world.group_name, ("all ranks", world.size()))
    return names


def summarise(
    assignment: Assignment,
    tracer: Tracer,
    axis_sizes: dict[str, int],
    seconds: float,
) -> RoleResult:
    """The tracer's record in numbers."""
    layout = assignment.config.layout(assignment.num_ranks)
    timeline = tracer.timeline()
    peak = timeline.peak_index()
    exchanges: dict[tuple[str, str, str], list[int]] = {}
    ahead = layout.pipeline - 1 - layout.stage(assignment.rank)
    step = partial(of_step, traced=assignment.micro_batches, rows=assignment.rows, ahead=ahead)
    for exchange, count in step(tracer.exchanges).items():
        entry = exchanges.setdefault((exchange.group, exchange.kind, exchange.module), [0, 0])
        entry[0] += count
        entry[1] += count * exchange.num_bytes
    flops = step(tracer.flops)
    curve = timeline.thinned(_CURVE_POINTS)
    return RoleResult(
        role=assignment.role,
        rank=assignment.rank,
        coordinates=layout.coordinates(assignment.rank),
        num_ranks=assignment.ranks_alike,
        num_parameters=tracer.bytes_of(Category.parameters) // 4,
        peak_bytes=int(timeline.total[peak]),
        peak_by_category=timeline.at(peak),
        peak_moment=int(timeline.moments[peak]),
        peak_module=tracer.module_at(int(timeline.moments[peak])),
        most_by_category=timeline.most(),
        flops_by_operation=dict(sorted(flops.items(), key=lambda item: -item[1])),
        exchanges=[
            ExchangeCount(axis, axis_sizes.get(axis, 1), kind, module, count, size)
            for (axis, kind, module), (count, size) in sorted(exchanges.items())
        ],
        num_groups=len(axis_sizes),
        num_operations=tracer.moment,
        trace_seconds=seconds,
        tracer_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        timeline=Curve(
            curve.moments.tolist(),
            {str(c): row.tolist() for c, row in zip(CATEGORIES, curve.by_category, strict=True)},
        ),
    )


def of_step(counts: Mapping[tuple[K, Pass], int], traced: int, rows: int, ahead: int) -> dict[K, int]:
    """Counts in a step of `rows` micro-batches, of counts by pass in one of `traced`, which do alike.

    `ahead` is by how many micro-batches forward passes are before backward ones. What is done once a step is done
    outside of passes or in the first ones. A further micro-batch is one more forward after a backward pass and one
    more backward after it: it adds what the last such pair has. What passes between stages is equally much for
    each, and is sent while another is under way.
    """
    last = {("forward", micro_batch(traced - 1)), ("backward", micro_batch(traced - 1 - ahead))}
    whole, between = Counter[K](), Counter[K]()
    for (key, under_way), count in counts.items():
        if isinstance(key, Exchange) and key.kind in BETWEEN_STAGES:
            between[key] += count
        else:
            whole[key] += count * (1 + (rows - traced) * (under_way in last))
    for key, count in between.items():
        each, rest = divmod(count, traced)
        assert rest == 0, f"{count} of {key} in {traced} micro-batches"
        whole[key] += each * rows
    return whole


class _Expected(Sizes):
    """Answers for a row that is one document, and experts that share their rows evenly."""

    index_products = 1 << 24  # 32 MB of them: fewer and larger pieces, and a trace takes half as long
    tile = 1 << 40  # products of an expert's rows are as many FLOPs, and take no memory, however they are cut

    def __init__(self, layout: Layout, rank: int, num_tokens: int) -> None:
        self.layout, self.rank, self.num_tokens = layout, rank, num_tokens

    def entries(self, table: CompressionTable, a: int, b: int) -> tuple[int, int]:
        here = table.entry_begin.shape[0]
        cuts, index = self.num_tokens // here, self.layout.slice_index(self.rank)
        if cuts != self.layout.num_slices:  # a span: the slices of all tensor ranks
            index //= self.layout.tensor
        return 0, (index * here + min(b, here)) // table.ratio

    def rows(self, counts: Tensor, choices: int) -> list[int]:
        experts = counts.shape[0]
        return [rounded_rows(choices // experts + (i < choices % experts)) for i in range(experts)]


class _ExpectedExchange(ExpertExchange):
    """The exchange of experts' rows with the sizes that the routing gives; at most `most` rows are received."""

    def __init__(self, exchange: ExpertExchange, routing: Routing, most: int | None) -> None:
        super().__init__(exchange.group)
        self.routing, self.most = routing, most

    def sizes(
        self, to_each: Tensor, from_each: Tensor, num_tokens: int, top_k: int
    ) -> tuple[list[int], list[int]]:
        received = self.routing.received(num_tokens * top_k, self.size, top_k, to_each.shape[1])
        received = received if self.most is None else min(received, self.most)
        return _dealt(num_tokens * top_k, self.size), _dealt(received, self.size)


def most_rows(config: RunConfig, layout: Layout, rank: int) -> int | None:
    """What the capacity of this rank's experts lets them take of its expert ranks' rows; None without one."""
    factor, architecture = config.parallel.expert_capacity_factor, config.model.architecture()
    if factor is None:
        return None
    first = rank - layout.expert_rank(rank)
    rows = layout.data_rank(first + layout.expert - 1) - layout.data_rank(first) + 1
    capacity = architecture.expert_capacity(factor, config.data.row_tokens)
    return rows * capacity * (architecture.n_routed_experts // layout.expert)


def _dealt(total: int, shares: int) -> list[int]:
    return [total // shares + (i < total % shares) for i in range(shares)]
