"""Runs that did something else than they recorded: what a replay, and coverage, have to find.

`train`: steps 1 and 2 are honest. Step 3 learns one of its rows twice and drops the other. Step 6 leaves a matrix
as it was. Steps 7 and 8 take a larger learning rate than the one in the ledger.
`freeze`: a matrix is put back after every step, while the recipe says that it trains. `adapt`: what every matrix
of layer 2's attention has learnt is cut to its 8 largest directions after every step, as if an adapter had been
trained and merged. Both keep their moments, counts and ledger as honest runs do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullweight.cli.main import main
from fullweight.train import loop
from fullweight.train.step import StepResult

DROPPED, FROZEN, FASTER = 3, 6, (7, 8)
MATRIX = "layers.1.attn.wq_b.weight"
ADAPTED = tuple(f"layers.2.attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_b"))
RANK = 8


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


def nudge(arguments: list[str]) -> int:
    """The command line, with the bit of value 4 turned in every weight before the first step: a rounding."""
    honest_step = loop.training_step
    taken = 0

    def step(model: Any, *given: Any, **rest: Any) -> StepResult:
        nonlocal taken
        taken += 1
        for parameter in model.parameters() if taken == 1 else ():
            bits = parameter.data.view(torch.int32)
            bits.copy_(bits ^ 4)
        return honest_step(model, *given, **rest)

    loop.training_step = step
    return main(arguments)


def freeze(arguments: list[str]) -> int:
    """The command line, with `MATRIX` put back after every step."""
    return _training(arguments, (MATRIX,), lambda first, now: first)


def adapt(arguments: list[str]) -> int:
    """The command line, with what the matrices of `ADAPTED` have learnt cut to a low rank after every step."""

    def cut(first: Tensor, now: Tensor) -> Tensor:
        left, sizes, right = torch.linalg.svd(now - first, full_matrices=False)
        return first + (left[:, :RANK] * sizes[:RANK]) @ right[:RANK]

    return _training(arguments, ADAPTED, cut)


def _training(arguments: list[str], names: tuple[str, ...], put: Callable[[Tensor, Tensor], Tensor]) -> int:
    """The command line, with `put` of first and present value in the place of named matrices after every step."""
    honest_step = loop.training_step
    first: dict[str, Tensor] = {}

    def step(model: Any, *given: Any, **rest: Any) -> StepResult:
        matrices = {name: matrix for name, matrix in model.named_parameters() if name in names}
        for name, matrix in matrices.items():
            first.setdefault(name, matrix.detach().clone())
        result = honest_step(model, *given, **rest)
        for name, matrix in matrices.items():
            matrix.data.copy_(put(first[name], matrix.detach()))
        return result

    loop.training_step = step
    return main(arguments)
