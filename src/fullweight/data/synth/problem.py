"""What a task is, and how a numbered problem is read off its index.

A warm-up task is a function of a `Chooser`: every choice (a name, a number, a phrasing) is one digit of a
mixed-radix index, so the number of distinct problems is the product of the radices, known exactly and
without listing them, and the same index gives the same problem on every platform. A task of the "or" tier
draws numbers until a solver finds exactly one optimum, so it takes a seeded `random.Random` instead.

Left out: difficulty schedules. A recipe mixes tasks by weight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

T = TypeVar("T")
Tier = Literal["warm-up", "or"]


@dataclass(frozen=True)
class Problem:
    """A question in words, the worked steps to its answer, and the answer as a canonical string."""

    question: str
    steps: str
    answer: str


class Chooser:
    """Reads choices off an index in mixed radix; `size` is the product of the radices so far.

    >>> chooser = Chooser(7)
    >>> chooser.pick("abc"), chooser.pick("xyz"), chooser.size
    ('b', 'z', 9)
    """

    def __init__(self, index: int) -> None:
        self._rest = index
        self.size = 1

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        self._rest, digit = divmod(self._rest, len(options))
        self.size *= len(options)
        return options[digit]

    def pick_distinct(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options, in an order that matters."""
        left = list(options)
        chosen = []
        for _ in range(count):
            chosen.append(self.pick(left))
            left.remove(chosen[-1])
        return chosen


@dataclass(frozen=True)
class WarmUpTask:
    """A task whose problems are numbered 0 .. num_problems - 1, all with different questions.

    `build` must make the same number of choices from the same numbers of options for every index.
    """

    name: str
    summary: str
    build: Callable[[Chooser], Problem]
    tier: Tier = "warm-up"

    @cached_property
    def num_problems(self) -> int:
        """How many distinct problems exist."""
        chooser = Chooser(0)
        self.build(chooser)
        return chooser.size

    def draw(self, rng: random.Random) -> Problem:
        """A problem, all equally likely."""
        return self.build(Chooser(rng.randrange(self.num_problems)))


@dataclass(frozen=True)
class ProgramTask:
    """An optimisation task; `build` returns None where the numbers drawn have no single exact optimum.

    `num_problems` is None: there are more than could ever be asked for (each has over 10^9 sets of numbers).
    """

    name: str
    summary: str
    build: Callable[[random.Random], Problem | None]
    tier: Tier = "or"
    num_problems: None = None

    def draw(self, rng: random.Random) -> Problem:
        """A problem with exactly one optimal plan."""
        while True:
            problem = self.build(rng)
            if problem is not None:
                return problem


Task = WarmUpTask | ProgramTask
