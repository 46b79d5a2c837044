"""From a configuration to everything that a run needs, in the order that finds mistakes earliest.

Tokenizer, then data, then the model: a bad data line fails before a model is made, and nothing is written
until all of it stands. The model is sharded before it has storage (`weights.py`), so no rank ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fullweight.checkpoint.receipt import Receipt
from fullweight.core.errors import DataError
from fullweight.core.machine import require_disk
from fullweight.core.types import Batch
from fullweight.data import sources
from fullweight.data.loader import PackedLoader, prepare
from fullweight.data.render import EncodingOptions, encode_prompt, render
from fullweight.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fullweight.devices import of
from fullweight.devices.power import PowerMeter
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.optim.groups import build_optimizers
from fullweight.parallel.apply import parallelize
from fullweight.parallel.engine import Engine, PlainEngine
from fullweight.parallel.fsdp import accumulating, resharding
from fullweight.parallel.mesh import Ranks
from fullweight.parallel.pipeline import Division, PipelineEngine, divide
from fullweight.train.config import RunConfig, check_vocabulary
from fullweight.train.evaluate import Question
from fullweight.train.guards import Guard
from fullweight.train.memory import check_memory
from fullweight.train.metrics import Peak, measure_peak
from fullweight.train.run_folder import RunFolder
from fullweight.train.state import TrainState
from fullweight.train.trackers import check_trackers
from fullweight.train.trainable import ParameterCount, sharding_units
from fullweight.train.weights import check_room_for_copy, empty_model, fill


@dataclass
class Run:
    """A run ready to step."""

    config: RunConfig
    folder: RunFolder
    ranks: Ranks
    tokenizer: Tokenizer
    architecture: DeepSeekV4Config
    state: TrainState
    engine: Engine
    guard: Guard
    held_out: list[Batch]
    questions: list[Question]
    peak: Peak
    power: PowerMeter
    imported: Receipt | None  # of the recipe's checkpoint; None when resumed or fresh

    @property
    def model(self) -> DeepSeekV4:
        assert isinstance(self.state.model, DeepSeekV4)
        return self.state.model

    @property
    def parameters(self) -> ParameterCount:
        """How many parameters there are and how many of them train."""
        return ParameterCount.of(self.model)

    @property
    def rows_per_rank(self) -> int:
        """Micro-batches of one step on each data rank."""
        return self.config.train.rows_per_step // self.ranks.data_size


@dataclass(frozen=True)
class Parts:
    """The model laid out over the ranks, its weights not filled yet, and what steps it."""

    model: DeepSeekV4
    engine: Engine
    optimizers: list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """This rank's part of the recipe's model, without storage, and the stages of its pipeline, if there is one."""

    model: DeepSeekV4
    division: Division | None


def plan_model(
    config: RunConfig, ranks: Ranks, architecture: DeepSeekV4Config, operations_for: str | None = None
) -> Plan:
    """Lay the model out over the ranks; nothing of its size is in memory yet.

    Its operations are those for tensors on `operations_for` (a device type), the ranks' own when absent.
    """
    model = empty_model(config, architecture, operations_for or ranks.device.type)
    division = divide(model, ranks, config.parallel, config.data.row_tokens)
    units, whole_experts = sharding_units(model), config.optimizer.name == "muon"
    parallelize(model, ranks, config.parallel, units, division, whole_experts=whole_experts)
    return Plan(model, division)


def parts_of(plan: Plan, config: RunConfig, ranks: Ranks) -> Parts:
    """Give the planned model storage, not filled, and the recipe's engine and optimisers."""
    model = plan.model
    model.to_empty(device=ranks.device)
    offload = config.parallel.offload_optimizer
    optimizers = []
    # what trains may lie in other stages of a pipeline alone
    if plan.division is None or any(p.requires_grad for p in model.parameters()):
        optimizers = build_optimizers(model, model.parameter_roles(), config.optimizer, offload=offload)
    return Parts(model, _engine(config, model, ranks, plan.division), optimizers)


def assemble(config: RunConfig, folder: RunFolder, ranks: Ranks, tokenizer_folder: Path | None = None) -> Run:
    """Build all parts; `tokenizer_folder` is where a run that is resumed kept its tokenizer.

    The weights of a resumed run are left unfilled, for `TrainState.restore` to fill.
    Raises ConfigError, DataError or CheckpointError on anything wrong; writes nothing.
    """
    layout = config.layout(ranks.size)
    check_trackers(config.trackers)
    architecture = config.model.architecture()
    check_memory(config, architecture, layout, ranks.device)
    tokenizer = make_tokenizer(config) if tokenizer_folder is None else load_tokenizer(tokenizer_folder)
    check_vocabulary(tokenizer.vocab_size, architecture, "the tokenizer's vocabulary")
    _check_samples(config)
    prepared = prepare(config.data, tokenizer)
    loader = PackedLoader(
        config.data,
        tokenizer,
        ratios=architecture.ratios,
        rank=layout.data_rank(ranks.rank),
        world_size=layout.data_size,
        prepared=prepared,
    )
    torch.manual_seed(config.train.seed)
    ranks = ranks.laid_out(layout)
    plan = plan_model(config, ranks, architecture)
    data = loader.state_dict()["data"]
    ranks.agree({"tokenizer": tokenizer.sha256, "data": data, "operations": plan.model.ops.name})
    parts = parts_of(plan, config, ranks)
    model = parts.model
    imported = fill(model, config) if tokenizer_folder is None else None  # a resumed run's state follows
    questions = questions_of(config, loader.held_out_samples(), tokenizer)
    if questions:
        check_room_for_copy(model, ranks)
    given = config.train.peak_flops_per_second
    guard = Guard(config.guard)
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        tokenizer=tokenizer,
        architecture=architecture,
        state=TrainState(model, parts.optimizers, loader, ranks, guard, config.train.seed),
        engine=parts.engine,
        guard=guard,
        held_out=loader.held_out_batches(),
        questions=questions,
        peak=Peak(given, "given in the recipe") if given is not None else measure_peak(ranks),
        power=of(ranks.device).power_meter(),
        imported=imported,
    )


def _engine(config: RunConfig, model: DeepSeekV4, ranks: Ranks, division: Division | None) -> Engine:
    if division is None:
        return PlainEngine(partial(config.method.forward, model))
    assert ranks.stages is not None
    tokens = config.data.row_tokens
    passes = accumulating if config.parallel.reshard_after == "step" else resharding
    return PipelineEngine(model, config.method.forward, division, ranks.stages, ranks.device, tokens, passes)


def make_tokenizer(config: RunConfig) -> Tokenizer:
    """The recipe's tokenizer: loaded, or trained (deterministically) from the first training samples."""
    if config.tokenizer is None:
        return load_tokenizer(config.data.tokenizer)
    records = islice(_training_records(config), config.tokenizer.num_samples)
    texts = (text for record in records for text in _plain_texts(record, config.data.encoding))
    return train_tokenizer(texts, config.tokenizer.vocab_size, config.data.encoding.name)


def check_disk(run: Run) -> None:
    """Raise ConfigError when the disk cannot hold the checkpoints and the export that the recipe asks for."""
    parameters = run.parameters
    # fp32 weights and at most two fp32 moments; one more than kept, for the new one is whole before one goes.
    needed = (run.config.checkpoint.keep + 1) * (parameters.total * 4 + parameters.trained * 8)
    if run.config.export.enabled:
        needed += _export_bytes(run)
    fix = "free some, choose another --output, or lower checkpoint.keep"
    require_disk(run.folder.root, needed, "keeping this run's checkpoints and export", fix)


def _export_bytes(run: Run) -> int:
    if run.config.export.format == "source" and run.imported is not None:
        return sum(entry["bytes"] for entry in run.imported.read)
    quantised = 1.1  # a byte a value, scales, and what stays BF16
    sizes = {"bfloat16": 2, "float32": 4, "fp8": quantised, "fp4": quantised, "source": 4}
    return int(run.parameters.total * sizes[run.config.export.format])


def _training_records(config: RunConfig) -> Iterator[sources.Record]:
    for source in config.data.sources:
        yield from sources.read(source)


def _plain_texts(record: sources.Record, options: EncodingOptions) -> Iterator[str]:
    try:
        rendered = render(record.sample, options)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    for segments in rendered:
        yield from (segment.text for segment in segments if not segment.control)


def _check_samples(config: RunConfig) -> None:
    """The first sample of each source says whether the method can use it."""
    for source in (*config.data.sources, *config.data.held_out):
        for record in islice(sources.read(source), 1):
            config.method.check_sample(record.sample, record.where)


def questions_of(config: RunConfig, samples: list[dict[str, Any]], tokenizer: Tokenizer) -> list[Question]:
    """The first held-out conversations, each up to its last answer."""
    if not config.method.generates:
        return []
    questions = []
    for sample in samples[: config.eval.num_samples]:
        messages = sample["messages"]
        answered = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if answered and answered[-1] > 0:
            asked = messages[: answered[-1]]
            prompt = encode_prompt(asked, tokenizer, config.data.encoding, sample.get("tools"))
            questions.append(Question(sample, len(asked), prompt))
    return questions
