"""How the ranks pass a step's micro-batches through the model: the one seam between the step and the layout.

The step asks an engine for all forward and backward passes of its micro-batches and gets this rank's *shares*:
whatever this rank alone computed, so that a plain sum over all ranks is the global number. An engine of pipeline
stages orders the passes its own way; the plain one, here, takes one micro-batch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fullweight.core import phase
from fullweight.core.errors import TrainingError
from fullweight.core.types import Batch

Weigh = Callable[[dict[str, Tensor]], Tensor]
"""Loss sums of a micro-batch to the scalar that is differentiated; linear, so that parts may be weighed apart."""
Mark = Callable[[str], None]
"""Told the name of a phase ("forward", "backward") when it ends."""


def micro_batch(number: int) -> str:
    """How the phase says which micro-batch is under way, here and in pipelines."""
    return f"micro-batch {number}"


class PassOutput(Protocol):
    """What one forward pass gives: loss sums, attached to the graph, tokens by MoE layer and expert, and drops."""

    @property
    def losses(self) -> dict[str, Tensor]: ...
    @property
    def expert_counts(self) -> Tensor: ...
    @property
    def dropped(self) -> Tensor: ...


@dataclass(frozen=True)
class Shares:
    """This rank's part of the sums over its micro-batches.

    losses fp64 without graph, expert_counts [L, X] and dropped [L] int64, as in `ModelOutput`. Components that
    this rank has no part in may be missing.
    """

    losses: dict[str, Tensor]
    expert_counts: Tensor
    dropped: Tensor


class Engine(Protocol):
    """All ranks of a layout call the same method together, with equally many micro-batches (one or more)."""

    def run(self, batches: Sequence[Batch], weigh: Weigh, mark: Mark) -> Shares:
        """Forward and backward of every micro-batch; gradients are added up in the parameters.

        Raises TrainingError when no loss depends on a parameter that trains.
        """

    def evaluate(self, batches: Sequence[Batch]) -> Shares:
        """Forward passes without gradients."""


class PlainEngine:
    """Every rank holds all layers: one micro-batch after the other."""

    def __init__(self, forward: Callable[[Batch], PassOutput]) -> None:
        self.forward = forward

    def run(self, batches: Sequence[Batch], weigh: Weigh, mark: Mark) -> Shares:
        shares = None
        for number, batch in enumerate(batches):
            phase.enter("forward", micro_batch(number))
            output = self.forward(batch)
            total = weigh(output.losses)
            if not total.requires_grad:
                raise TrainingError(
                    "no loss of this step depends on a parameter that trains; train.trainable and train.frozen "
                    "must leave one that train.indexer_loss, the method or the model's other losses reach"
                )
            shares = _added(shares, output)
            mark("forward")
            phase.enter("backward", micro_batch(number))
            total.backward()
            mark("backward")
        assert shares is not None, "a step needs at least one micro-batch"
        return shares

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Shares:
        shares = None
        for number, batch in enumerate(batches):
            phase.enter("evaluation", f"held-out row {number}")
            shares = _added(shares, self.forward(batch))
        assert shares is not None, "an evaluation needs at least one micro-batch"
        return shares


def _added(shares: Shares | None, output: PassOutput) -> Shares:
    """`shares` with one more micro-batch in them."""
    losses = {name: value.detach().double() for name, value in output.losses.items()}
    if shares is None:
        return Shares(losses, output.expert_counts, output.dropped)
    return Shares(
        {name: shares.losses.get(name, 0) + value for name, value in losses.items()},
        shares.expert_counts + output.expert_counts,
        shares.dropped + output.dropped,
    )
