"""The training step itself, timed: `train.step.training_step`, not a copy of it.

bf16 compute with fp32 master weights, gradients and moments; forward and backward of all losses (next token,
MTP, indexer, balance), gradient norm and clipping, optimizer, router bias. Weights are fresh and routing is
natural. One row is one micro-batch and one step.
"""

from __future__ import annotations

import torch

from fullweight.bench.measure import BenchConfig, Measurement, peak_bytes, resident_bytes, timed_steps
from fullweight.core.types import Batch, PackedLayout
from fullweight.methods.sft import Pretrain
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.optim.groups import OptimizerConfig, build_optimizers
from fullweight.parallel.engine import PlainEngine
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard, GuardConfig
from fullweight.train.step import LossConfig, Phases, training_step


def measure_fullweight(config: BenchConfig, length: int) -> Measurement:
    """Run warm-up and timed steps on a row of `length` tokens."""
    baseline = resident_bytes()
    architecture = config.architecture()
    model = initialise(DeepSeekV4(architecture, torch.bfloat16), config.seed)
    settings = OptimizerConfig(name=config.optimizer, learning_rate=1e-4)
    optimizers = build_optimizers(model, model.parameter_roles(), settings)
    layout = PackedLayout.build(config.document_lengths(length), architecture.ratios)
    batch = Batch(config.tokens(length), torch.ones(length), layout)
    device = torch.device("cpu")
    guard = Guard(GuardConfig())
    losses: dict[str, float] = {}

    def step() -> dict[str, float]:
        phases = Phases(device)
        result = training_step(
            model,
            Pretrain(),
            optimizers,
            [batch],
            engine=PlainEngine(model),
            losses=LossConfig(),
            clip_norm=settings.clip_norm,
            guard=guard,
            ranks=Ranks(0, 1, device),
            phases=phases,
        )
        if result.refusal is not None:
            guard.enforce(0, result.refusal)
        losses.update(result.losses)
        return phases.seconds

    steps, waiting = timed_steps(config, step)
    notes = {"operations": model.ops.name, "routing": "natural"}
    return Measurement(steps, baseline, peak_bytes(), waiting.share(), losses, notes)
