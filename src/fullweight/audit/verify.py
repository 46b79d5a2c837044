"""Whether a bundle's claims hold: every rule looked at, every claim computed again, one verdict.

Levels: integrity (what the bundle says agrees with itself and with who signed it) and recomputation (figures from
raw lines, and what is at hand of checkpoints); when asked for, repetition of steps or layers (`drawn.py`). What no
bundle can show, that nothing else was run, stays a claim that is not checkable.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fullweight.audit import beside_rules, chain_rules, coverage_rules, file_rules, number_rules
from fullweight.audit.claims import CLAIMS, Verdict, verdicts
from fullweight.audit.drawn import CLAIM as REPLAY
from fullweight.audit.drawn import Replayed, Replaying, taken_again
from fullweight.audit.rule import RULES, Finding, Status, apply
from fullweight.audit.signing import Trust, require_signature, signature_problem, signed
from fullweight.audit.subject import Subject, open_subject
from fullweight.core.errors import ConfigError

_MODULES = (chain_rules, number_rules, file_rules, beside_rules, coverage_rules)  # importing them fills RULES
_SIGNATURE, _TOGETHER = "bundle.signature", "bundles.seeds"
ALL = "all"
COMPLETENESS = (
    "No evidence shows completeness: that there was no other run, no other data and no discarded attempt. A "
    "signature shows who sealed the bundle and that it is unchanged, not that the run happened; replay of windows "
    "chosen after the roots were published, and time stamps of others, raise the cost of inventing one."
)


@dataclass(frozen=True)
class Report:
    """What a verification found of one bundle."""

    bundle: Path
    run: str
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    replayed: Replayed | None = None  # its verdict is among the others

    @property
    def refuted(self) -> bool:
        found = [one.status for one in self.findings] + [one.status for one in self.verdicts]
        return Status.refuted in found

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "bundle": str(self.bundle),
            "run": self.run,
            "refuted": self.refuted,
            "claims": [asdict(one) for one in self.verdicts],
            "rules": [asdict(one) for one in self.findings],
            "replay": None if self.replayed is None else self.replayed.as_dict(),
            "completeness": COMPLETENESS,
        }


def verify(
    root: Path,
    *,
    run: Path | None = None,
    trust: Trust | None = None,
    with_data: bool = False,
    replaying: Replaying | None = None,
) -> Report:
    """Look at a bundle, with the folder of the run and its data where given; take steps again where asked to.

    Raises RefusedError when it cannot be read, FullweightError on a key that cannot.
    """
    return _report(open_subject(root, run, with_data), trust or Trust(), replaying)


def verify_together(roots: Sequence[Path], trust: Trust | None = None) -> list[Report]:
    """Look at bundles of several runs: each, and that they are several runs."""
    subjects = [open_subject(root) for root in roots]
    reports = [_report(subject, trust or Trust()) for subject in subjects]
    found = _together(subjects)
    return [
        Report(one.bundle, one.run, (*one.findings, finding), one.verdicts)
        for one, finding in zip(reports, found, strict=True)
    ]


def required(names: Sequence[str]) -> tuple[str, ...]:
    """Names of claims and rules that must hold; `all` stands for every claim that evidence can show, and the
    signature. Raises ConfigError on a name that is none of them.
    """
    claims = [kind.name for kind in CLAIMS]
    known = {*claims, REPLAY, _SIGNATURE, _TOGETHER, *(rule.name for rule in RULES)}
    found: list[str] = []
    for name in names:
        if name != ALL and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no claim or rule {name!r}{meant} Claims: {', '.join([*claims, REPLAY])}")
        found += [kind.name for kind in CLAIMS if kind.basis] + [_SIGNATURE] if name == ALL else [name]
    return tuple(dict.fromkeys(found))


def lacking(report: Report, names: Sequence[str]) -> list[tuple[str, str]]:
    """Which of the required names do not hold in a report, and why; what was not even stated does not."""
    found = {one.claim: (one.status, one.told) for one in report.verdicts}
    found |= {one.rule: (one.status, one.told) for one in report.findings}
    absent = (Status.not_checkable, "the bundle does not state it, or it was not asked for")
    judged = [(name, *found.get(name, absent)) for name in names]
    return [(name, told) for name, status, told in judged if status is not Status.holds]


def _report(subject: Subject, trust: Trust, replaying: Replaying | None = None) -> Report:
    findings = [_signature(subject, trust), *apply(RULES, subject)]
    found = verdicts(subject, findings)
    replayed = None if replaying is None else taken_again(subject, replaying)
    found += [] if replayed is None else [replayed.verdict]
    return Report(subject.bundle.root, subject.manifest.run, tuple(findings), tuple(found), replayed)


def _signature(subject: Subject, trust: Trust) -> Finding:
    name = _SIGNATURE
    if not signed(subject.bundle):
        if trust.given:
            return Finding(name, Status.refuted, "a signature was asked for, and the bundle has none")
        return Finding(name, Status.not_checkable, "the bundle is not signed: its origin cannot be checked")
    if not trust.given:
        require_signature(subject.bundle)
        return Finding(name, Status.not_checkable, "it is signed; give the key that you trust with --public-key")
    problem = signature_problem(subject.bundle, trust)
    if problem is not None:
        return Finding(name, Status.refuted, problem)
    return Finding(name, Status.holds, "every file is as the holder of the trusted key signed it")


def _together(subjects: Sequence[Subject]) -> list[Finding]:
    """Runs that are counted as several must be several: ids and seeds are unique."""
    name = _TOGETHER
    seeds = Counter((s.settings[0].train.seed, s.settings[0].data.seed) for s in subjects)
    runs = Counter(s.manifest.run for s in subjects)
    findings = []
    for subject in subjects:
        seed = (subject.settings[0].train.seed, subject.settings[0].data.seed)
        if runs[subject.manifest.run] > 1:
            told = f"run {subject.manifest.run[:40]} is given {runs[subject.manifest.run]} times"
            findings.append(Finding(name, Status.refuted, told))
        elif seeds[seed] > 1:
            told = f"seeds {seed} are those of {seeds[seed]} bundles: one run was repeated, not several made"
            findings.append(Finding(name, Status.refuted, told))
        else:
            findings.append(Finding(name, Status.holds, "no other of these bundles has its run or its seeds"))
    return findings
