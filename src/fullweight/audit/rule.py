"""A rule: one thing that must hold of a bundle, by a name that never changes.

A rule says what it proves and what it cannot. Its check yields what is wrong, the first place first; a check whose
means are not at hand raises `NotCheckableError` with the reason. `RULES` is filled by the modules that define
them, in the order in which a verdict tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fullweight.audit.subject import Subject

_MOST_PROBLEMS = 1000


class Status(StrEnum):
    """What became of a rule or a claim."""

    holds = "holds"
    refuted = "refuted"
    not_checkable = "not checkable"


class NotCheckableError(Exception):
    """What a check needs is not at hand; the message says what."""


Check = Callable[["Subject"], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """`proves` and `cannot` are for the documents and the verdict."""

    name: str
    proves: str
    cannot: str
    check: Check


@dataclass(frozen=True)
class Finding:
    """What a rule found: the first problem, or why it could not look."""

    rule: str
    status: Status
    told: str


RULES: list[Rule] = []


def rule(name: str, proves: str, cannot: str = "") -> Callable[[Check], Check]:
    """Put a check into `RULES`."""

    def register(check: Check) -> Check:
        assert all(other.name != name for other in RULES), name
        RULES.append(Rule(name, proves, cannot, check))
        return check

    return register


def apply(rules: Sequence[Rule], subject: Subject) -> list[Finding]:
    """What each rule finds, in order."""
    return [_finding(one, subject) for one in rules]


def _finding(one: Rule, subject: Subject) -> Finding:
    try:
        problems = list(islice(one.check(subject), _MOST_PROBLEMS))
    except NotCheckableError as error:
        return Finding(one.name, Status.not_checkable, str(error))
    if not problems:
        return Finding(one.name, Status.holds, one.proves)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(one.name, Status.refuted, problems[0] + more)
