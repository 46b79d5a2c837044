"""How the ranks of a run are laid out: the recipe's section `[parallel]`, and the numbers that follow from it.

Ranks = pipeline x replicate x shard x context x tensor, counted with tensor fastest and pipeline slowest, so that
the ranks which talk most sit in one node. Expert ranks are consecutive ranks of shard x context x tensor. Every
rule that a layout must keep is here and fails before a process group exists, with what was found, what was
expected and the nearest choice that works. Imports no torch: the planner asks the same questions of ranks that
are not there.

Left out: whether a layout fits the memory or is fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config
from fullweight.parallel.stages import Schedule, legal_micro_batches


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, and where each rank stands on them."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pipeline * self.replicate * self.dense

    @property
    def dense(self) -> int:
        """Ranks over which the parameters of one stage and replica are cut, and over which experts are dealt."""
        return self.shard * self.context * self.tensor

    @property
    def expert_shard(self) -> int:
        """Ranks over which the same experts are cut."""
        return self.dense // self.expert

    @property
    def data_size(self) -> int:
        """Groups of ranks that work on different rows."""
        return self.replicate * self.shard

    @property
    def num_slices(self) -> int:
        """Ranks that share a row, each with its own tokens (and heads, where tensor > 1)."""
        return self.context * self.tensor

    @property
    def plain(self) -> bool:
        """Whether every rank runs all layers on whole rows: parameters are cut for storage alone."""
        return self.dense * self.replicate == self.world and self.num_slices == self.expert == 1

    def stage(self, rank: int) -> int:
        """Position on the pipeline axis."""
        return rank // (self.replicate * self.dense)

    def data_rank(self, rank: int) -> int:
        """Which rows: position on replicate x shard."""
        return rank % (self.replicate * self.dense) // self.num_slices

    def slice_index(self, rank: int) -> int:
        """Which tokens of the row: position on context x tensor."""
        return rank % self.num_slices

    def expert_rank(self, rank: int) -> int:
        """Which experts: position on the expert axis."""
        return rank % self.dense % self.expert

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position on every axis that ranks are counted along."""
        places, rest = {}, rank
        for axis in ("tensor", "context", "shard", "replicate", "pipeline"):
            rest, places[axis] = divmod(rest, getattr(self, axis))
        return places

    def counts_row(self, rank: int) -> bool:
        """Whether this rank speaks for its row where a row must count once: tokens, normalisers, lengths."""
        return self.stage(rank) == 0 and self.slice_index(rank) == 0

    def axes(self) -> dict[str, int]:
        """Sizes by axis, for the record; those that are 1 are left out."""
        return {name: size for name, size in asdict(self).items() if size > 1}


class ParallelConfig(Config):
    """The axes of the layout, and how memory and precision are traded."""

    pipeline: PositiveInt = Field(1, description="stages that the layers are divided into")
    schedule: Schedule = Field("1f1b", description="order of micro-batches in a pipeline")
    virtual_stages: PositiveInt = Field(1, description="stages on each pipeline rank")
    stage_layers: tuple[PositiveInt, ...] = Field(
        (), description="main layers of each stage, in order; by cost when empty"
    )
    reshard_after: Literal["step", "micro_batch"] = Field(
        "step", description="how long a pipeline's stage has its weights and gradients whole"
    )
    replicate: PositiveInt = Field(1, description="copies of the sharded model (HSDP)")
    shard: NonNegativeInt = Field(0, description="ranks that share parameters (FSDP); 0: all that are left")
    context: PositiveInt = Field(1, description="ranks that divide a row's tokens")
    tensor: PositiveInt = Field(1, description="ranks that divide attention's heads")
    expert: PositiveInt = Field(1, description="ranks that divide the experts, of shard x context x tensor")
    expert_capacity_factor: PositiveFloat | None = Field(
        None,
        description="most that an expert takes of a row, in even shares; the rest is dropped. None: no limit",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field("fp32", description="gradients on the wire; sums stay fp32")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="made again in backward: nothing, the experts, whole blocks"
    )
    deterministic: bool = Field(False, description="only operations that repeat bit for bit")
    offload_optimizer: bool = Field(False, description="the optimiser's moments live in host memory")

    def layout(
        self, world_size: int, architecture: DeepSeekV4Config, row_tokens: int, rows_per_step: int
    ) -> Layout:
        """The layout on so many ranks. Raises ConfigError for what cannot be, with the nearest choice that can."""
        layout = self._sized(world_size)
        _check_experts(layout, architecture)
        _check_heads(layout, architecture)
        _check_slices(layout, architecture, row_tokens)
        _check_rows(layout, rows_per_step)
        self._check_stages(layout, architecture, rows_per_step // layout.data_size)
        return layout

    def _sized(self, world_size: int) -> Layout:
        given = {name: getattr(self, name) for name in ("pipeline", "replicate", "context", "tensor")}
        product = self.pipeline * self.replicate * self.context * self.tensor
        written = " x ".join(f"{name} {size}" for name, size in given.items() if size > 1) or "1"
        if world_size % product:
            below, above = world_size // product * product, (world_size // product + 1) * product
            fix = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"[parallel] {written} = {product} does not divide the number of ranks ({world_size}); "
                f"start {fix} ranks, or choose axes whose product divides {world_size}"
            )
        left = world_size // product
        if self.shard not in {0, left}:
            raise ConfigError(
                f"[parallel] shard {self.shard} x {written} needs {self.shard * product} ranks, there are "
                f"{world_size}; use parallel.shard={left}, or 0 for what is left"
            )
        return Layout(**given, shard=left, expert=self.expert)

    def _check_stages(self, layout: Layout, architecture: DeepSeekV4Config, micro_batches: int) -> None:
        stages, layers = self.pipeline * self.virtual_stages, architecture.num_hidden_layers
        if self.pipeline == 1:
            for name, alone in (("virtual_stages", 1), ("stage_layers", ()), ("reshard_after", "step")):
                if getattr(self, name) != alone:
                    raise ConfigError(f"parallel.{name} needs parallel.pipeline above 1; remove it")
            return
        expected = {"1f1b": (1, 1), "zbv": (2, 2)}.get(self.schedule, (2, layers))
        if not expected[0] <= self.virtual_stages <= expected[1]:
            wanted = f"exactly {expected[0]}" if expected[0] == expected[1] else f"{expected[0]} or more"
            raise ConfigError(
                f"parallel.schedule={self.schedule!r} works with {wanted} virtual stages a rank, found "
                f"parallel.virtual_stages={self.virtual_stages}; use {expected[0]}"
            )
        if self.reshard_after == "micro_batch" and self.schedule != "1f1b":
            raise ConfigError(
                f"parallel.reshard_after='micro_batch' reduces the gradients of all of a rank's layers after each "
                f"backward pass, and parallel.schedule={self.schedule!r} has passes of a part of them; use "
                "schedule='1f1b', or reshard_after='step'"
            )
        if stages > layers:
            most = max(layers // self.virtual_stages, 1)
            raise ConfigError(
                f"parallel.pipeline ({self.pipeline}) x virtual_stages ({self.virtual_stages}) makes {stages} "
                f"stages of {layers} layers; a stage needs one: use pipeline={most} or less"
            )
        if self.stage_layers and (len(self.stage_layers) != stages or sum(self.stage_layers) != layers):
            raise ConfigError(
                f"parallel.stage_layers has {len(self.stage_layers)} stages with {sum(self.stage_layers)} layers, "
                f"expected {stages} with {layers}; correct it, or leave it out to balance by cost"
            )
        if not legal_micro_batches(self.schedule, self.pipeline, micro_batches):
            most = max(micro_batches, self.pipeline) + self.pipeline
            legal = [n for n in range(1, most + 1) if legal_micro_batches(self.schedule, self.pipeline, n)]
            rows = _nearest(micro_batches * layout.data_size, [n * layout.data_size for n in legal])
            raise ConfigError(
                f"a pipeline of {self.pipeline} with parallel.schedule={self.schedule!r} cannot order "
                f"the {micro_batches} micro-batches of a step on each data rank; use train.rows_per_step={rows}"
            )


def _check_experts(layout: Layout, architecture: DeepSeekV4Config) -> None:
    experts, expert, ranks = architecture.n_routed_experts, layout.expert, layout.dense
    if experts % expert or ranks % expert:
        legal = [n for n in range(1, ranks + 1) if experts % n == 0 and ranks % n == 0]
        raise ConfigError(
            f"parallel.expert ({expert}) must divide the {experts} routed experts and the {ranks} ranks of shard "
            f"x context x tensor; use {_nearest(expert, legal)}"
        )


def _check_heads(layout: Layout, architecture: DeepSeekV4Config) -> None:
    heads, groups, tensor = architecture.num_attention_heads, architecture.o_groups, layout.tensor
    if heads % tensor or groups % tensor:
        legal = [n for n in range(1, groups + 1) if heads % n == 0 and groups % n == 0]
        raise ConfigError(
            f"parallel.tensor ({tensor}) must divide the {heads} attention heads and the {groups} groups of the "
            f"output projection; use {_nearest(tensor, legal)}"
        )


def _check_slices(layout: Layout, architecture: DeepSeekV4Config, row_tokens: int) -> None:
    slices = layout.num_slices
    if slices == 1:
        return
    # A slice gets what lies before it from one neighbour: the window, or the tokens of a compressed entry (in CSA
    # those of two compression windows).
    reach = [2 * r if r == CSA_RATIO else r for r in architecture.ratios]
    least = max(architecture.sliding_window, *reach, 1)
    if row_tokens % slices or row_tokens // slices < least:
        legal = [n for n in range(1, row_tokens // least + 1) if row_tokens % n == 0]
        raise ConfigError(
            f"parallel.context ({layout.context}) x tensor ({layout.tensor}) = {slices} must cut a row of "
            f"{row_tokens} tokens into equal parts of at least {least} (the model's window and longest "
            f"compression); use {_nearest(slices, legal) if legal else 1} in all, or raise data.row_tokens to a "
            f"multiple of {slices} that is at least {least * slices}"
        )


def _check_rows(layout: Layout, rows: int) -> None:
    size = layout.data_size
    if rows % size:
        below, above = rows // size * size, (rows // size + 1) * size
        fix = f"{below} or {above}" if below else f"{above}"
        which = "ranks" if size == layout.world else "data ranks, replicate x shard"
        raise ConfigError(
            f"train.rows_per_step ({rows}) is not divisible by the number of {which} ({size}); use {fix}"
        )


def _nearest(value: int, legal: list[int]) -> str:
    """The legal values on both sides of one that is not."""
    below, above = [n for n in legal if n < value], [n for n in legal if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
