"""What each pipeline rank holds in memory, by the categories of `fullweight rehearse`, without tracing anything.

Parameters, moments and gradients follow from shapes and cuts (`shards.py`). The rest is a replay of the step over
sizes: blocks forward and backward (`passes.py`), FSDP's gathers and reductions (`sharding.py`), the schedule's
order and what it holds (`rank.py`). Elements that are alike are replayed once; what repeats between layouts too.

Categories are each at their own worst moment, as in a rehearsal's `most_by_category`; the peak is the worst moment
of all together. Uneven routing multiplies what experts receive by `skew`. Left out: what a chip's own kernels and
libraries take (`Chip.usable_bytes` takes off what is assumed for them); a row is taken for one document.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.parts import Part, parts_of
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.parallel.stages import balanced_layers, stages_of
from fullweight.planner.elements import Around, Pass, block_pass, tail_pass
from fullweight.planner.muon import Stack, Update, product_flops, profile_of, stack_of, update_of
from fullweight.planner.passes import Row
from fullweight.planner.rank import Held, Step
from fullweight.planner.sharding import NOTHING, Unit, unit_of
from fullweight.planner.shards import Sums, block_shapes, buffer_bytes, held, root_shapes, sums
from fullweight.planner.tape import CATEGORIES, NO_CHANGE, Profile, moved, together

_FP32 = 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one pipeline rank by category, each at its worst moment, and of the step's worst moment
    together."""

    stage: int
    parameters: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    communication: int
    temporaries: int
    peak: int
    routed_state: int  # of parameters, optimizer and gradients, what belongs to routed experts

    def by_category(self) -> dict[str, int]:
        names = ("parameters", "optimizer", "gradients", "gathered", "activations", "communication", "temporaries")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Setting:
    """What decides memory beside the model and the layout."""

    row_tokens: int
    micro_batches: int
    optimizer: str = "adamw"
    skew: float = 1.0
    operations: str = "cpu"  # a name of `operations.SETS`
    capacity: float | None = None  # most that an expert takes of a row, in even shares

    @property
    def load(self) -> float:
        """Rows of the fullest expert rank over the mean of all that were chosen."""
        return self.skew if self.capacity is None else min(self.skew, self.capacity)


def num_groups(layout: Layout) -> int:
    """Process groups that a rank is in, as `parallel/mesh.py` makes them: that of all ranks, which serves an axis
    as large too, and one for each axis of each mesh that the layout has."""
    if layout.world == 1:
        return 1
    sizes = [layout.dense]
    if layout.tensor > 1:
        sizes += [layout.tensor, layout.shard * layout.context]
    if layout.expert > 1:
        sizes += [layout.expert, layout.expert_shard]
    others = layout.replicate, layout.num_slices, layout.context, layout.pipeline
    sizes += [size for size in others if size > 1]
    return 1 + sum(size != layout.world for size in sizes)


@dataclass(frozen=True, eq=False)
class Mine:
    """What one pipeline rank runs of the model. There is one of each, so that it is its own key."""

    parts: tuple[Part, ...]  # of its stages, in order
    stages: tuple[int, ...]
    layers: tuple[int, ...]
    everywhere: tuple[int, ...]  # with the MTP block, where that is here
    kinds: tuple[LayerKind | None, ...]  # of those
    first: bool
    last: bool
    buffers: int  # bytes of tables and biases


def _cuts(layout: Layout) -> tuple[int, int, int]:
    """What decides how a stage's parameters are cut."""
    return layout.shard * layout.context, layout.tensor, layout.expert


class MemoryModel:
    """The memory of one model under many layouts: what repeats between them is counted once."""

    def __init__(self, config: DeepSeekV4Config) -> None:
        self.config = config
        self._blocks: dict[tuple[object, ...], tuple[Sums, Unit]] = {}
        self._passes: dict[tuple[object, ...], Pass] = {}
        self._mine: dict[tuple[object, ...], Mine] = {}
        self._counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._steps: dict[tuple[object, ...], Profile] = {}
        self._matrices: dict[tuple[object, ...], tuple[Stack, ...]] = {}
        self._updates: dict[tuple[object, ...], Update] = {}
        self._most: dict[tuple[object, ...], Update] = {}
        self._least: dict[tuple[int, int, int], tuple[int, int]] = {}

    def of(self, parallel: ParallelConfig, layout: Layout, setting: Setting) -> Iterator[StageMemory]:
        """Every pipeline rank, in order, each counted when it is asked for."""
        for rank in range(layout.pipeline):
            yield self.rank(parallel, layout, setting, rank)

    def rank(self, parallel: ParallelConfig, layout: Layout, setting: Setting, rank: int) -> StageMemory:
        """One of them."""
        config, adamw = self.config, setting.optimizer == "adamw"
        mine = self.mine(parallel, setting.row_tokens, rank)
        blocks = [self.block(layout, layer, adamw) for layer in mine.everywhere]
        root = self.root(layout, mine.first, mine.last, adamw)
        numbers = root[0].here + sum(b.here for b, _ in blocks)
        moments = 0 if parallel.offload_optimizer else root[0].moments + sum(b.moments for b, _ in blocks)
        moments += root[0].counted + sum(
            b.counted for b, _ in blocks
        )  # counters stay, and are as large as a number
        units = {layer: unit for layer, (_, unit) in zip(mine.everywhere, blocks, strict=True)}
        behind = config.num_hidden_layers
        every = tuple(units.get(layer, NOTHING) for layer in range(behind + 1))
        parameters = _FP32 * numbers + mine.buffers
        update = NO_CHANGE
        if not adamw:
            update = profile_of(self._all_stacks(layout, mine), offload=parallel.offload_optimizer)
        # where the moments are decides nothing of the passes
        key = (parallel.model_copy(update={"offload_optimizer": False}), layout, setting, rank)
        if key not in self._steps:
            have = Held(_FP32 * numbers, root[1], every, mine.parts, mine.stages)
            row = self._row(layout, setting)
            replay = Step(config, parallel, layout, row, setting.micro_batches, have, self._pass)
            self._steps[key] = replay.profile()
        start = moved(parameters=parameters, optimizer=_FP32 * moments)
        step = together((start, self._steps[key], update))
        routed = sum(
            b.routed_here * 2 + (0 if parallel.offload_optimizer else b.routed_moments) for b, _ in blocks
        )
        return StageMemory(
            rank, **dict(zip(CATEGORIES, step.most, strict=True)), peak=step.peak, routed_state=_FP32 * routed
        )

    def update(self, parallel: ParallelConfig, layout: Layout, row_tokens: int) -> Update:
        """What Muon does in a step: the most of any pipeline rank, of everything."""
        counts = self.stages(parallel, row_tokens)
        key = (counts, parallel.schedule == "zbv", layout.pipeline, *_cuts(layout))
        if key not in self._most:
            found = self.updates(parallel, layout, row_tokens)
            numbers = [(u.flops, u.calls, u.bytes_given, u.bytes_waited, u.entries, u.others) for u in found]
            self._most[key] = Update(*map(max, zip(*numbers, strict=True)))
        return self._most[key]

    def updates(self, parallel: ParallelConfig, layout: Layout, row_tokens: int) -> list[Update]:
        """What Muon does in a step on every pipeline rank, in order."""
        ranks = (self.mine(parallel, row_tokens, rank) for rank in range(layout.pipeline))
        return [self._update(layout, mine) for mine in ranks]

    def least_update(self, layout: Layout) -> Update:
        """What no cut of stages can do better than: all that lies whole, spread evenly over stages."""
        key = _cuts(layout)
        if key not in self._least:
            blocks = self.config.num_hidden_layers + (1 if self.config.num_nextn_predict_layers else 0)
            stacks = [stack for layer in range(blocks) for stack in self._stacks(layout, layer)]
            flops = sum(stack.whole * product_flops(stack.matrix) for stack in stacks)
            self._least[key] = flops, sum(stack.entries for stack in stacks)
        flops, entries = self._least[key]
        return Update(flops=flops // layout.pipeline, entries=entries // layout.pipeline)

    def _update(self, layout: Layout, mine: Mine) -> Update:
        """Muon's step on a pipeline rank."""
        key = (mine.kinds, mine.first, mine.last, *_cuts(layout))
        if key not in self._updates:
            sums = [self.block(layout, layer, adamw=False)[0] for layer in mine.everywhere]
            sums.append(self.root(layout, mine.first, mine.last, adamw=False)[0])
            update = update_of(self._all_stacks(layout, mine))
            self._updates[key] = replace(update, others=sum(s.others for s in sums))
        return self._updates[key]

    def _all_stacks(self, layout: Layout, mine: Mine) -> list[Stack]:
        """Muon's parameters on a pipeline rank, in the model's order."""
        root = (stack_of(self.config, layout, *one) for one in root_shapes(self.config, mine.first, mine.last))
        blocks = (self._stacks(layout, layer) for layer in mine.everywhere)
        return [*(s for s in root if s is not None), *(s for block in blocks for s in block)]

    def _stacks(self, layout: Layout, layer: int) -> tuple[Stack, ...]:
        """Muon's parameters of one block."""
        key = (self.kind(layer), *_cuts(layout))
        if key not in self._matrices:
            found = (stack_of(self.config, layout, *one) for one in block_shapes(self.config, layer))
            self._matrices[key] = tuple(s for s in found if s is not None)
        return self._matrices[key]

    def mine(self, parallel: ParallelConfig, row_tokens: int, rank: int) -> Mine:
        """What a pipeline rank runs."""
        counts = self.stages(parallel, row_tokens)
        key = (counts, parallel.pipeline, parallel.schedule == "zbv", rank)
        if key not in self._mine:
            every = parts_of(counts)
            stages = stages_of(rank, parallel.pipeline, len(every), parallel.schedule)
            parts = tuple(every[stage] for stage in stages)
            first, last = any(part.is_first for part in parts), any(part.is_last for part in parts)
            layers = tuple(layer for part in parts for layer in part.layers)
            behind = [self.config.num_hidden_layers] if last and self.config.num_nextn_predict_layers else []
            everywhere = (*layers, *behind)
            kinds = tuple(self.kind(layer) for layer in everywhere)
            buffers = buffer_bytes(self.config, everywhere)
            self._mine[key] = Mine(parts, stages, layers, everywhere, kinds, first, last, buffers)
        return self._mine[key]

    def kind(self, layer: int) -> LayerKind | None:
        """Of a layer's parameters; None for the MTP block's."""
        return None if layer == self.config.num_hidden_layers else self.config.layer_kind(layer)

    def _pass(self, what: str, row: Row, which: int, around: Around) -> Pass:
        """An element's profiles; layers of one kind share them."""
        kind: object = which
        if what == "block":
            layer = which
            kind = self.config.layer_kind(layer), self.config.is_hash_layer(layer)
        slices = row.layout.context, row.layout.tensor, row.layout.expert
        key = (what, kind, row.tokens, row.skew, row.most, row.operations, slices, around)
        if key not in self._passes:
            if what == "block":
                self._passes[key] = block_pass(self.config, row, which, around)
            else:
                self._passes[key] = tail_pass(self.config, row, around)
        return self._passes[key]

    def _row(self, layout: Layout, setting: Setting) -> Row:
        most = self.most_rows(layout, setting)
        return Row(setting.row_tokens, layout, setting.skew, setting.operations, most)

    def most_rows(self, layout: Layout, setting: Setting) -> int | None:
        """Rows that a capacity lets the experts of a rank take, of all rows that their expert ranks work on."""
        if setting.capacity is None or layout.expert == 1:
            return None
        rows = -(-layout.expert // layout.num_slices)
        each = self.config.expert_capacity(setting.capacity, setting.row_tokens)
        return rows * each * (self.config.n_routed_experts // layout.expert)

    def stages(self, parallel: ParallelConfig, row_tokens: int) -> tuple[int, ...]:
        """Layers of each stage, balanced by cost where the recipe does not say."""
        if parallel.stage_layers:
            return parallel.stage_layers
        key = (parallel.pipeline * parallel.virtual_stages, row_tokens)
        if key not in self._counts:
            self._counts[key] = balanced_layers(self.config, *key)
        return self._counts[key]

    def block(self, layout: Layout, layer: int, adamw: bool) -> tuple[Sums, Unit]:
        """What the rank that holds most has of one block."""
        kind = self.kind(layer)
        key = (kind, layout.replicate, *_cuts(layout), adamw)
        if key not in self._blocks:
            parameters = held(self.config, layout, block_shapes(self.config, layer), adamw=adamw)
            self._blocks[key] = sums(parameters), unit_of(parameters, layout.expert > 1)
        return self._blocks[key]

    def root(self, layout: Layout, first: bool, last: bool, adamw: bool) -> tuple[Sums, Unit]:
        """The same of what lies outside of all blocks."""
        key = (first, last, layout.replicate, layout.shard * layout.context, layout.tensor, adamw)
        if key not in self._blocks:
            shapes = root_shapes(self.config, first, last)
            parameters = held(self.config, layout, shapes, adamw=adamw)
            self._blocks[key] = sums(parameters), unit_of(parameters, dealt=False)
        return self._blocks[key]


def memory_of(
    config: DeepSeekV4Config, parallel: ParallelConfig, layout: Layout, setting: Setting
) -> list[StageMemory]:
    """Every pipeline rank of one layout, in order."""
    return list(MemoryModel(config).of(parallel, layout, setting))
