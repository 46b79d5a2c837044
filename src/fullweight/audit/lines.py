"""Whether what a step gave again is what its ledger line says.

Some values are arithmetic on the recipe and the data (tokens, which samples, the learning rate): they must be
equal whatever the machine. Others are results of floating-point sums (losses, the gradient's norm): equal bit for
bit on the same stack, and within a bound on another. Times and rates are not looked at: they cannot be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_EXACT = ("tokens", "batch", "skipped", "unseen_embeddings", "routing", "parameters")
_SCHEDULE = ("learning_rate", "learning_rates")
_FLOAT = ("loss", "total_loss", "grad_norm")
_SAME_STACK = ("loss_hex", "experts", "without_gradient")
# A cosine differs by a bit between mathematical libraries.
_SCHEDULE_BOUND = 1e-12


@dataclass(frozen=True)
class Divergence:
    """A value of a ledger line that the replay did not give."""

    step: int
    field: str  # dotted name within the line
    recorded: Any
    replayed: Any
    relative: float | None = None  # |replayed - recorded| / |recorded|, where both are finite numbers

    def __str__(self) -> str:
        return f"step {self.step}, {self.field}: recorded {self.recorded}, replayed {self.replayed}"


def divergences(recorded: dict[str, Any], replayed: dict[str, Any]) -> list[Divergence]:
    """Every value of one step that is not equal, in the order of importance; `replayed` is from `one_step`.

    Values that the recorded line lacks are not looked at, but for those that every version wrote.
    """
    step, found = recorded["step"], []
    for name in (*_EXACT, *_SCHEDULE, *_FLOAT, *_SAME_STACK):
        if name not in recorded and name not in _FLOAT:
            continue
        for field, a, b in _leaves(name, recorded.get(name), replayed.get(name)):
            # the reason of a skip has numbers in it, which are compared themselves
            same = (a is None) == (b is None) if name == "skipped" else a == b
            if not same:
                found.append(Divergence(step, field, a, b, _relative(a, b)))
    return found


def beyond(found: list[Divergence], bound: float) -> list[Divergence]:
    """Those that rounding on another machine does not explain: losses within `bound`, the rest equal."""
    return [d for d in found if not _rounding(d, bound)]


def _rounding(d: Divergence, bound: float) -> bool:
    group = d.field.partition(".")[0]
    if group in _SAME_STACK:
        return True  # losses themselves are judged; counts of experts move with single tokens
    if d.relative is None:
        return False
    return d.relative <= (bound if group in _FLOAT else _SCHEDULE_BOUND if group in _SCHEDULE else -1)


def _leaves(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) or isinstance(b, dict):
        left, right = (v if isinstance(v, dict) else {} for v in (a, b))
        # what a later version writes beside has nothing to be compared with
        for key in left:
            yield from _leaves(f"{name}.{key}", left[key], right.get(key))
        return
    yield name, _told(a), _told(b)


def _told(value: Any) -> Any:
    """A value as JSON keeps it: names for what is not finite, lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _relative(a: Any, b: Any) -> float | None:
    numbers = [v for v in (a, b) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != 2:
        return None
    size = abs(a)
    return abs(b - a) / size if size else math.inf
