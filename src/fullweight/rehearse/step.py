"""One training step under the tracer: what a rehearsal does with tensors without data, and a real run with data.

The step is `train.step.training_step`, with the model, layout, engine and optimisers that `train` would use. The
optimisers' state is made before the record begins, as it is in every step but a run's first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fullweight.core.types import Batch
from fullweight.optim.offload import host_tensors
from fullweight.parallel.mesh import Ranks
from fullweight.rehearse.memory import Category
from fullweight.rehearse.tracer import Tracer
from fullweight.train.assemble import Parts
from fullweight.train.config import RunConfig
from fullweight.train.guards import Guard
from fullweight.train.step import Phases, training_step


def traced_step(config: RunConfig, ranks: Ranks, parts: Parts, batches: Sequence[Batch], tracer: Tracer) -> None:
    """Run one step; the tracer holds its record, from the weights and moments that were there before."""
    _make_optimizer_state(parts.optimizers)
    model = parts.model
    with tracer, tracer.watching(model):
        tracer.leave_out(tensor for optimizer in parts.optimizers for tensor in host_tensors(optimizer))
        tracer.mark([*model.parameters(), *model.buffers()], Category.parameters)
        tracer.mark(_moments(parts.optimizers), Category.optimizer)
        tracer.mark_gradients(model)
        training_step(
            model,
            config.method,
            parts.optimizers,
            batches,
            engine=parts.engine,
            losses=config.train.loss,
            clip_norm=config.optimizer.clip_norm,
            guard=Guard(config.guard),
            ranks=ranks,
            phases=Phases(ranks.device),
        )


def _make_optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """A step at rate 0 with gradients of 0 leaves the weights as they are and makes the moments."""
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _moments(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    found = []
    for optimizer in optimizers:
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found
