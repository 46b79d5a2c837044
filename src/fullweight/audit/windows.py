"""Which steps of a run to repeat.

A window `a:b` is the steps a+1 to b: it starts from the state after step a. What can be checked in full is a
window between two states that are kept, so the candidates are the pairs of neighbours among the kept generations,
oldest first; with one generation alone, the steps from the beginning to it.

Windows are drawn so that nobody can have prepared for them: the draw depends on the ledger's last line, which
fixes what was recorded, and on a value that becomes known only later (a public random beacon, or whatever the
auditor likes). Draw i is the candidate number

    int(SHA-256("fullweight replay\\n" + head + "\\n" + value + "\\n" + i)) mod (number of candidates left)

where head is the hex SHA-256 of the ledger's last line (without its newline), i counts from 0 in decimal, the
digest is read big-endian, and a candidate that was drawn is taken out. Anybody can repeat it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from fullweight.core.errors import ConfigError

_T = TypeVar("_T")
_WINDOW = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, order=True)
class Window:
    """Steps `start` + 1 to `stop`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop, self

    @property
    def steps(self) -> range:
        return range(self.start + 1, self.stop + 1)

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @staticmethod
    def parse(text: str) -> Window:
        """From `a:b`. Raises ConfigError."""
        found = _WINDOW.fullmatch(text.strip())
        if found is None or int(found[1]) >= int(found[2]):
            raise ConfigError(
                f"a window is two steps, the first below the second, such as 20:25 for steps 21 to 25; "
                f"found {text!r}"
            )
        return Window(int(found[1]), int(found[2]))


def candidates(kept: Sequence[int]) -> list[Window]:
    """The windows that can be checked in full, for the steps of the kept generations."""
    steps = sorted({step for step in kept if step > 0})
    if len(steps) == 1:
        return [Window(0, steps[0])]
    return [Window(a, b) for a, b in pairwise(steps)]


def draw(among: Sequence[_T], head: str, value: str, count: int) -> list[_T]:
    """`count` of the candidates (all, if there are no more), as the module says."""
    left, drawn = list(among), []
    for i in range(min(count, len(left))):
        digest = hashlib.sha256(f"fullweight replay\n{head}\n{value}\n{i}".encode()).digest()
        drawn.append(left.pop(int.from_bytes(digest, "big") % len(left)))
    return drawn
