"""The configuration of a run: one nested, frozen object, read from a TOML recipe and `--set a.b=c`.

Each component's settings live beside the component; this module nests them and holds the rules that cross
sections, which fail before anything is read or computed. What depends on the number of ranks or on the
tokenizer is checked by `layout` and `check_vocabulary`, still before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fullweight.checkpoint.async_save import SaveConfig
from fullweight.checkpoint.plan import ExportFormat
from fullweight.checkpoint.selection import ALL, select
from fullweight.core.config import Config
from fullweight.core.errors import ConfigError
from fullweight.data.loader import DataConfig
from fullweight.devices import DeviceName
from fullweight.doctor.config import DeviceConfig
from fullweight.methods import MethodConfig
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import IndexerLoss
from fullweight.models.deepseek_v4.parts import pieces
from fullweight.optim.groups import OptimizerConfig
from fullweight.optim.schedule import ScheduleConfig
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.parallel.launch import LaunchConfig
from fullweight.train.evaluate import EvalConfig
from fullweight.train.guards import GuardConfig
from fullweight.train.step import LossConfig
from fullweight.train.trackers import TrackerConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class ModelSection(Config):
    """Which model: a preset, a published config.json (fresh weights), or a checkpoint folder (its weights).

    `changes` replaces fields of a preset's or config's architecture; a checkpoint's is what it is.
    """

    preset: str | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    changes: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [n for n in ("preset", "config", "checkpoint") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of preset, config and checkpoint, found {found}")
        if self.checkpoint is not None and self.changes:
            raise ValueError("changes do not go with a checkpoint, whose architecture is fixed; remove them")
        self.architecture()  # a wrong preset or impossible sizes fail here
        return self

    def architecture(self) -> DeepSeekV4Config:
        """The sizes; reads config.json where one is named. Raises ConfigError."""
        if self.preset is not None:
            return DeepSeekV4Config.preset(self.preset, **self.changes)
        if self.config is not None:
            published = DeepSeekV4Config.from_file(self.config).model_dump()
            return DeepSeekV4Config.resolve({**published, **self.changes}, str(self.config))
        assert self.checkpoint is not None
        return DeepSeekV4Config.from_file(self.checkpoint)


class TokenizerSection(Config):
    """A small tokenizer trained from the training samples and kept with the run, for small models."""

    vocab_size: PositiveInt
    num_samples: PositiveInt = 5000


class TrainSection(Config):
    """Length, batch, precision and device of a run."""

    num_steps: PositiveInt
    rows_per_step: PositiveInt = Field(1, description="packed rows of an optimiser step, all ranks together")
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        "bf16", description="compute; master weights are fp32, in fp64 too: slow, for comparisons"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    device: DeviceName = "auto"
    trainable: tuple[str, ...] = Field(
        ALL, min_length=1, description="parameters that train: shell patterns on published names"
    )
    frozen: tuple[str, ...] = Field((), description="patterns of parameters taken out of trainable")
    indexer_loss: IndexerLoss = Field("selected", description="entries whose scores the indexer learns from")
    csa_attention: Literal["selected", "visible"] = Field(
        "selected", description="entries that compressed-sparse attention reads in training steps"
    )
    loss: LossConfig = LossConfig()
    peak_flops_per_second: PositiveFloat | None = Field(
        None, description="what 100 % MFU means, all ranks together; measured with a bf16 matmul when absent"
    )

    @model_validator(mode="after")
    def _indexer_has_a_target(self) -> Self:
        if self.csa_attention == "visible" and self.indexer_loss == "selected":
            raise ValueError(
                'csa_attention="visible" selects nothing that indexer_loss="selected" could learn from; '
                'set indexer_loss="visible" (warm-up of the indexer) or "none"'
            )
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        return _DTYPES[self.precision]

    def trained_names(self, architecture: DeepSeekV4Config) -> frozenset[str] | None:
        """Names of what trains (`checkpoint.selection.select`), None for everything. Raises ConfigError."""
        if self.trainable == ALL and not self.frozen:
            return None
        chosen = select(architecture, self.trainable, self.frozen)
        if self.indexer_loss == "none" and all(".indexer." in name for name in chosen):
            raise ConfigError(
                f"train.trainable ({', '.join(self.trainable)}) leaves only indexers to train, and "
                'train.indexer_loss="none" gives them no loss; set it to "visible" (warm-up) or "selected"'
            )
        return chosen


class OpsSection(Config):
    """Operations by name; a group that names its own is taken from there."""

    default: str = Field("auto", description="a set of operations; auto takes the best for the device")
    linear: str | None = None
    norm_rotary: str | None = None
    swiglu: str | None = None
    hyper_connection: str | None = None
    compress: str | None = None
    indexer: str | None = None
    attention: str | None = None
    experts: str | None = None
    cross_entropy: str | None = None

    @property
    def chosen(self) -> dict[str, str]:
        """Groups that name operations of their own."""
        return {group: name for group, name in self if group != "default" and name is not None}


class CheckpointSection(SaveConfig):
    """When to save the exact training state (the end and an interruption always do), how, and how many to keep."""

    every: PositiveInt | None = None


class BoundariesSection(Config):
    """What passes between the pieces of the model, kept so that single ones can be checked (docs/evidence.md)."""

    every: PositiveInt | None = Field(
        None, description="keep it of the step after each so many, and the states before and after that step"
    )
    pieces: tuple[str, ...] = Field(
        ("all",), min_length=1, description="all, or of embedding, layer-N, mtp and head"
    )

    def chosen(self, architecture: DeepSeekV4Config) -> tuple[str, ...]:
        """Names of the pieces, in the model's order. Raises ConfigError on one that there is not."""
        every = pieces(architecture.num_hidden_layers, architecture.num_nextn_predict_layers > 0)
        absent = [name for name in self.pieces if name not in (*every, "all")]
        if absent:
            raise ConfigError(
                f"boundaries.pieces has {absent[0]!r}, and this model has {', '.join(every)}; name some of "
                'these, or "all"'
            )
        return every if "all" in self.pieces else tuple(name for name in every if name in self.pieces)


class ExportSection(Config):
    """Whether the final weights are written under the published names, and in what form."""

    enabled: bool = True
    format: ExportFormat = Field(
        "bfloat16", description="fp4, fp8: as the releases; source: the form of model.checkpoint, scales and all"
    )


class RunConfig(Config):
    """Everything that decides what a run computes."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSection
    data: DataConfig
    tokenizer: TokenizerSection | None = None
    method: MethodConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainSection
    ops: OpsSection = OpsSection()
    device: DeviceConfig = DeviceConfig()
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    boundaries: BoundariesSection = BoundariesSection()
    export: ExportSection = ExportSection()
    trackers: TrackerConfig = TrackerConfig()
    output: Path | None = Field(None, description="run folder; runs/<name> when absent")

    @model_validator(mode="after")
    def _cross_rules(self) -> Self:
        self.schedule.num_warmup_steps(self.train.num_steps)
        architecture = self.model.architecture()
        self.train.trained_names(architecture)
        self.boundaries.chosen(architecture)
        if self.tokenizer is not None:
            if self.data.tokenizer != DataConfig.model_fields["tokenizer"].default:
                raise ValueError(
                    f"data.tokenizer ({self.data.tokenizer}) and the section [tokenizer], which trains one, "
                    "exclude each other; remove one"
                )
            if self.model.checkpoint is not None:
                raise ValueError(
                    "the section [tokenizer] trains a new vocabulary, which does not fit the weights of "
                    "model.checkpoint; remove it and set data.tokenizer to the checkpoint's folder"
                )
            check_vocabulary(self.tokenizer.vocab_size, architecture, "tokenizer.vocab_size")
        if self.export.format == "source" and self.model.checkpoint is None:
            raise ValueError(
                'export.format="source" writes the form of model.checkpoint, and this recipe names none; use '
                "bfloat16, float32, fp8 or fp4"
            )
        longest = architecture.max_position_embeddings
        if self.data.row_tokens > longest:
            raise ValueError(
                f"data.row_tokens ({self.data.row_tokens}) exceeds the model's max_position_embeddings "
                f"({longest}); lower it"
            )
        return self

    def layout(self, size: int) -> Layout:
        """How the run is laid out on `size` ranks. Raises ConfigError when it cannot be."""
        architecture = self.model.architecture()
        return self.parallel.layout(size, architecture, self.data.row_tokens, self.train.rows_per_step)


def check_vocabulary(size: int, architecture: DeepSeekV4Config, what: str) -> None:
    """Raise ConfigError when token ids can exceed the model's embedding."""
    if size > architecture.vocab_size:
        raise ConfigError(
            f"{what} ({size}) exceeds the model's vocab_size ({architecture.vocab_size}); use at most "
            f"that, or set model.changes.vocab_size={size}"
        )
