"""A run that did something else than it recorded: what a replay has to find.

Steps 1 and 2 are honest. Step 3 learns one of its rows twice and drops the other. Step 6 leaves a matrix as it
was. Steps 7 and 8 take a larger learning rate than the one in the ledger.
"""

from __future__ import annotations

from typing import Any

from fullweight.cli.main import main
from fullweight.train import loop
from fullweight.train.step import StepResult

DROPPED, FROZEN, FASTER = 3, 6, (7, 8)
MATRIX = "layers.1.attn.wq_b.weight"


def train(arguments: list[str]) -> int:
    """The command line, with a step that cheats; for `tests.processes.fullweight(call=...)`."""
    honest_step, honest_rate = loop.training_step, loop.set_learning_rate
    taken = 0

    def step(model: Any, method: Any, optimizers: Any, batches: list[Any], **rest: Any) -> StepResult:
        nonlocal taken
        taken += 1
        rows = [batches[1]] * len(batches) if taken == DROPPED else batches
        matrix = dict(model.named_parameters())[MATRIX]
        before = matrix.detach().clone()
        result = honest_step(model, method, optimizers, rows, **rest)
        if taken == FROZEN:
            matrix.data.copy_(before)
        return result

    def rate(optimizers: Any, value: float) -> None:
        honest_rate(optimizers, value * (1.25 if taken + 1 in FASTER else 1.0))

    loop.training_step, loop.set_learning_rate = step, rate  # type: ignore[assignment]
    return main(arguments)
