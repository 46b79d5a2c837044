"""What a check says: how bad it is, what was found, what was expected and what to do.

An error corrupts results, hangs or ends the job: training refuses to start. A warning is unwise: training refuses
too, unless the recipe accepts the finding by name. A note is worth knowing and stops nothing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """In order of weight."""

    error = "error"
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    `name` is what a recipe accepts it by: the variable, or the check. `exports` are the variables that mend it, an
    empty value meaning `unset`. `where` names machines or ranks when not all are meant.
    """

    severity: Severity
    name: str
    found: str
    expected: str
    fix: str
    exports: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.name}{place}: found {self.found}, expected {self.expected}; {self.fix}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_weight(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; by name among equals."""
    order = list(Severity)
    return sorted(findings, key=lambda f: (order.index(f.severity), f.name, f.where))


def blocking(findings: Iterable[Finding], accepted: Collection[str]) -> list[Finding]:
    """What stops a run: every error, and the warnings that are not accepted by name."""
    return [
        f
        for f in by_weight(findings)
        if f.severity is Severity.error or (f.severity is Severity.warning and f.name not in accepted)
    ]


def exports(findings: Iterable[Finding]) -> list[str]:
    """Shell lines that mend what variables can mend; of several answers for one variable the gravest's."""
    chosen: dict[str, str] = {}
    for finding in by_weight(findings):
        for name, value in finding.exports.items():
            chosen.setdefault(name, value)
    return [f'export {name}="{value}"' if value else f"unset {name}" for name, value in chosen.items()]


def refusal(findings: Sequence[Finding]) -> str:
    """The message of a run that does not start: each blocking finding, and how to accept those that may be."""
    lines = ["this machine is not ready (`fullweight doctor` shows all of it):"]
    lines += [f"  {f.severity}: {f}" for f in findings]
    lines += [f"  {line}" for line in exports(findings)]
    unwise = sorted({f.name for f in findings if f.severity is Severity.warning})
    if unwise:
        names = ", ".join(f'"{name}"' for name in unwise)
        lines.append(f"warnings are unwise, not wrong; to go on all the same set device.accept = [{names}]")
    return "\n".join(lines)
