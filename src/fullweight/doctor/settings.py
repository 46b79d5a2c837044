"""What a rule over environment variables is given, and small questions that rules ask.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fullweight.doctor.environment import value_of
from fullweight.doctor.findings import Finding, Severity

Environment = Mapping[str, str]
LONG_SECONDS = 4 * 3600  # a collective that waits longer than this burns a cluster for hours before it says so


@dataclass(frozen=True)
class Setting:
    """What the variables are for."""

    device: str  # ascend, cuda or cpu
    ranks: int = 1
    group_timeout_seconds: float | None = None  # of torch's process groups; None = not known
    deterministic: bool = False
    chip: str = ""


Rule = Callable[[Environment, Setting], Iterator[Finding]]


def equals(environment: Environment, name: str, *values: str) -> bool:
    """Whether the variable, or its default, is one of the values; case is ignored."""
    return value_of(name, environment).casefold() in {v.casefold() for v in values}


def off(environment: Environment, name: str) -> bool:
    return equals(environment, name, "0", "n", "no", "f", "false")


def on(environment: Environment, name: str) -> bool:
    return equals(environment, name, "1", "y", "yes", "t", "true")


def slow(name: str, found: str, expected: str, why: str) -> Finding:
    """A setting that costs speed and nothing else; `expected` is what to export, "" to unset."""
    wanted = expected or "unset"
    return Finding(Severity.warning, name, found, wanted, f"slow: {why}", {name: expected})


def told_seconds(seconds: float) -> str:
    """A timeout in words.

    >>> told_seconds(2147480), told_seconds(float("inf"))
    ('2147480 s (24.9 days)', '0 (for ever)')
    """
    if seconds == float("inf"):
        return "0 (for ever)"
    return f"{seconds:.0f} s" + (f" ({seconds / 86400:.1f} days)" if seconds >= 86400 else "")
