"""Samples from a mixture of tasks: seeded, distinct, and in proportion at every length.

Each task draws from its own random stream, named by seed and task, and tasks take turns by largest deficit.
So the first N samples do not depend on how many follow them, and a task's problems do not depend on which
other tasks are in the mixture. Nothing depends on the process or the platform.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from fullweight.core.config import Config, nearest
from fullweight.core.errors import DataError
from fullweight.data.synth.answers import format_answer
from fullweight.data.synth.networks import NETWORK_TASKS
from fullweight.data.synth.problem import Problem, Task
from fullweight.data.synth.programs import PLAN_TASKS
from fullweight.data.synth.warmup import WARM_UP_TASKS

TASKS: dict[str, Task] = {task.name: task for task in (*WARM_UP_TASKS, *PLAN_TASKS, *NETWORK_TASKS)}
TIERS: dict[str, list[str]] = {
    tier: [task.name for task in TASKS.values() if task.tier == tier] for tier in ("warm-up", "or")
}


class SynthConfig(Config):
    """What to generate.

    `mixture` gives weights, of any positive scale, to tasks (`TASKS`) or to tiers (`TIERS`: "warm-up" for
    models of a few million parameters, "or" for real ones); a tier's weight is shared equally by its tasks.
    """

    seed: int = 0
    num_samples: int = Field(default=10_000, ge=1, le=10_000_000)
    mixture: dict[str, float] = Field(default={"warm-up": 1.0})

    @field_validator("mixture")
    @classmethod
    def _known_and_positive(cls, mixture: dict[str, float]) -> dict[str, float]:
        if not mixture:
            raise ValueError('no task to draw from; give weights such as {"warm-up": 1.0}')
        for name, weight in mixture.items():
            if name not in TASKS and name not in TIERS:
                raise ValueError(f"unknown task {name!r}; {nearest(name, [*TASKS, *TIERS])}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {name!r} is {weight}, expected a positive number")
        return mixture

    def task_weights(self) -> dict[str, float]:
        """Weight of each task that takes part, tiers spread over their tasks, in order of name."""
        weights: dict[str, float] = {}
        for name, weight in sorted(self.mixture.items()):
            members = TIERS.get(name, [name])
            for member in members:
                weights[member] = weights.get(member, 0.0) + weight / len(members)
        return dict(sorted(weights.items()))


def generate(config: SynthConfig) -> Iterator[dict[str, Any]]:
    """Yield `num_samples` samples with distinct questions and ids.

    A sample is {"id", "task", "messages": [user, assistant with "reasoning_content" and "content"],
    "answer"}. Raises DataError, before the first sample, when a task has too few distinct problems.
    """
    for name, wanted in sorted(Counter(_turns(config)).items()):
        available = TASKS[name].num_problems
        if available is not None and wanted > available:
            raise DataError(
                f"task {name!r} has {available} distinct problems and the mixture asks for {wanted} of them; "
                "lower num_samples or its weight"
            )
    return _samples(config)


def _samples(config: SynthConfig) -> Iterator[dict[str, Any]]:
    streams = {name: _distinct(TASKS[name], config.seed) for name in config.task_weights()}
    for name in _turns(config):
        yield _sample(name, next(streams[name]))


def describe() -> dict[str, dict[str, Any]]:
    """One example sample of each task, by task name."""
    return {name: _sample(name, next(_distinct(task, seed=0))) for name, task in TASKS.items()}


def _turns(config: SynthConfig) -> Iterator[str]:
    """The task of each sample: always the one farthest behind its share."""
    weights = config.task_weights()
    total = math.fsum(weights.values())  # rounded once: Python's own sum rounds otherwise from 3.12 on
    shares = {name: weight / total for name, weight in weights.items()}
    given = dict.fromkeys(shares, 0)
    for i in range(1, config.num_samples + 1):
        name = max(shares, key=lambda task: shares[task] * i - given[task])
        given[name] += 1
        yield name


def _distinct(task: Task, seed: int) -> Iterator[Problem]:
    """A task's problems, no question twice; endless only while unseen ones remain."""
    rng = random.Random(f"fullweight synth {seed} {task.name}")
    seen: set[bytes] = set()
    while True:
        problem = task.draw(rng)
        key = hashlib.sha256(problem.question.encode()).digest()[:16]
        if key not in seen:
            seen.add(key)
            yield problem


def _sample(task: str, problem: Problem) -> dict[str, Any]:
    return {
        "id": f"{task}-{hashlib.sha256(problem.question.encode()).hexdigest()[:16]}",
        "task": task,
        "messages": [
            {"role": "user", "content": problem.question},
            {
                "role": "assistant",
                "reasoning_content": problem.steps,
                "content": format_answer(problem.answer),
            },
        ],
        "answer": problem.answer,
    }
