"""What a run claims of itself, and how anybody computes it again.

A claim is one row of `CLAIMS`: a sentence, how its value follows from a bundle, and the rules it stands on.
Sealing writes value and status; verifying computes the value again and never believes the status. `unsupported` is
a claim of which the run kept no evidence, `unverified` one whose evidence was not at hand when it was sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fullweight.audit.rule import Finding, Status
from fullweight.audit.subject import Claim, Subject
from fullweight.evidence.performance import performance

_LEDGER = (
    "bundle.hashes",
    "ledger.chain",
    "ledger.run",
    "ledger.steps",
    "ledger.segments",
    "ledger.end",
    "manifest.bound",
)
_TIMES = (*_LEDGER, "ledger.times", "ledger.step-times", "ledger.idle", "ledger.phases")
_TOKENS = (*_LEDGER, "ledger.tokens", "ledger.documents")
_MFU = (*_TIMES, *_TOKENS[len(_LEDGER) :], "ledger.flops", "ledger.mfu", "ledger.peak")


class Sealed(StrEnum):
    """Status of a claim when it was sealed."""

    verified = "verified"
    unverified = "unverified"
    unsupported = "unsupported"


@dataclass(frozen=True)
class Kind:
    """One claim that every run makes; `value` is None where the run kept nothing to compute it from."""

    name: str
    statement: str
    unit: str | None
    scope: str
    basis: tuple[str, ...]
    value: Callable[[Subject, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Verdict:
    """What became of one claim."""

    claim: str
    statement: str
    value: Any
    unit: str | None
    status: Status
    told: str


CLAIMS: tuple[Kind, ...] = (
    Kind(
        "steps",
        "the run made this many optimiser steps",
        "steps",
        "steps that stand; what was superseded after an interruption is not counted",
        (*_LEDGER, "ledger.finish"),
        lambda subject, figures: figures["steps"],
    ),
    Kind(
        "interruptions",
        "the run was interrupted this often",
        None,
        "by the segments of the ledger; an attempt that left no line is not in it",
        _LEDGER,
        lambda subject, figures: figures["goodput"]["interruptions"],
    ),
    Kind(
        "skipped-steps",
        "this many steps left the weights as they were",
        "steps",
        "steps that the guard refused",
        (*_LEDGER, "ledger.skips"),
        lambda subject, figures: figures["skipped"],
    ),
    Kind(
        "tokens",
        "the run trained on this many tokens",
        "tokens",
        "real tokens of the steps that stand, without padding; a sample of a second epoch counts again",
        _TOKENS,
        lambda subject, figures: figures["tokens"]["real"],
    ),
    Kind(
        "held-out-loss",
        "loss on held-out samples after the last step",
        "nats per token",
        "mean cross-entropy of the tokens that are learnt",
        (*_LEDGER, "evaluation.recomputed", "evaluation.samples"),
        lambda subject, figures: _last_evaluation(subject, "loss"),
    ),
    Kind(
        "held-out-score",
        "share of held-out questions answered exactly after the last step",
        None,
        "greedy decoding, checked by the program that belongs to the data",
        (*_LEDGER, "evaluation.recomputed", "evaluation.samples", "evaluation.answers"),
        lambda subject, figures: _last_evaluation(subject, "score"),
    ),
    Kind(
        "step-seconds",
        "median time of an optimiser step",
        "s",
        "all steps that stand, the first included; data loading included, evaluation and saving not",
        (*_TIMES, "performance.recomputed"),
        lambda subject, figures: (figures["step_seconds"] or {}).get("median"),
    ),
    Kind(
        "tokens-per-second",
        "real tokens over the time of all steps",
        "tokens/s",
        "all ranks together",
        (*_TIMES, *_TOKENS[len(_LEDGER) :], "ledger.throughput", "performance.recomputed"),
        lambda subject, figures: (figures["tokens_per_second"] or {}).get("overall"),
    ),
    Kind(
        "mfu",
        "model FLOPs utilisation over all steps",
        None,
        "exact sparse model FLOPs, forward and backward, no recompute, no padding; over the run's stated peak",
        (*_MFU, "ledger.routing", "performance.recomputed"),
        lambda subject, figures: figures["mfu"]["overall"],
    ),
    Kind(
        "goodput",
        "time of productive steps over wall time, from the first line to the last",
        None,
        "evaluation, saving, start-up, interruptions and work done twice are the rest",
        (*_TIMES, "ledger.wall-time", "performance.recomputed"),
        lambda subject, figures: figures["goodput"]["share"],
    ),
    Kind(
        "energy-per-token",
        "energy of all recorded steps over the real tokens of those that stand",
        "J/token",
        "as the machine's own counters tell it",
        (*_TIMES, "performance.recomputed"),
        lambda subject, figures: figures["energy"]["joules_per_token"],
    ),
    Kind(
        "routing-natural",
        "routing was never forced",
        None,
        "all recorded steps",
        (*_LEDGER, "ledger.routing"),
        lambda subject, figures: True,
    ),
    Kind(
        "learning-rate",
        "the learning rate followed the configured schedule",
        None,
        "all recorded steps",
        (*_LEDGER, "manifest.config", "ledger.learning-rate"),
        lambda subject, figures: True,
    ),
    Kind(
        "parameters-trained",
        "this many parameters were trained",
        "parameters",
        "of the model's own count; those that are frozen by configuration are not in it",
        (*_LEDGER, "ledger.parameters"),
        lambda subject, figures: subject.manifest.parameters.trained,
    ),
    Kind(
        "full-parameter",
        "every parameter was trained",
        None,
        "moments and changes of every tensor and expert in the checkpoint that coverage.json is of",
        (*_LEDGER, "coverage.totals", "coverage.recomputed"),
        lambda subject, figures: _full_parameter(subject),
    ),
    Kind(
        "complete",
        "nothing else was run than what is told here",
        None,
        "hidden runs, hidden data and discarded attempts",
        (),
        lambda subject, figures: None,
    ),
)


def sealed_claims(subject: Subject, findings: Sequence[Finding]) -> list[Claim]:
    """The claims of a bundle that is being made, with what the rules found of it."""
    figures = performance(subject.history, subject.flops)
    found = {f.rule: f for f in findings}
    claims = []
    for kind in CLAIMS:
        value = kind.value(subject, figures)
        held = all(rule in found and found[rule].status is Status.holds for rule in kind.basis)
        status = Sealed.unsupported if value is None else Sealed.verified if held else Sealed.unverified
        claims.append(
            Claim(
                name=kind.name,
                statement=kind.statement,
                value=value,
                unit=kind.unit,
                scope=kind.scope,
                status=status.value,
                basis=list(kind.basis),
            )
        )
    return claims


def verdicts(subject: Subject, findings: Sequence[Finding]) -> list[Verdict]:
    """What becomes of each claim that a bundle states; a claim that is unknown here cannot be checked."""
    figures, kinds = performance(subject.history, subject.flops), {kind.name: kind for kind in CLAIMS}
    found = {f.rule: f for f in findings}
    result = []
    for claim in subject.claims:
        kind = kinds.get(claim.name)
        if kind is None:
            status, told = Status.not_checkable, "a claim that is unknown here"
        else:
            status, told = _judged(claim, kind, kind.value(subject, figures), found)
        result.append(Verdict(claim.name, claim.statement, claim.value, claim.unit, status, told))
    return result


def _judged(claim: Claim, kind: Kind, value: Any, found: Mapping[str, Finding]) -> tuple[Status, str]:
    if (claim.statement, claim.unit, claim.scope) != (kind.statement, kind.unit, kind.scope):
        return Status.refuted, "its words are not those of the claim of that name"
    if not agrees(claim.value, value):
        return Status.refuted, f"{claim.value!r} is claimed, {value!r} follows from the evidence"[:300]
    basis = [found[name] for name in kind.basis if name in found]
    for status in (Status.refuted, Status.not_checkable):
        if first := next((f for f in basis if f.status is status), None):
            return status, f"{first.rule}: {first.told}"
    if value is None:
        return Status.not_checkable, "the run kept no evidence of it" if kind.basis else "no evidence can show it"
    missing = [name for name in kind.basis if name not in found]
    if missing:
        return Status.not_checkable, f"{missing[0]} was not looked at"
    return Status.holds, "computed again from the ledger" if kind.basis else ""


def agrees(stated: Any, computed: Any, relative: float = 1e-9) -> bool:
    """Whether two JSON values are the same, numbers to within what other float64 arithmetic may differ."""
    if isinstance(stated, bool) or isinstance(computed, bool):
        return stated is computed
    if isinstance(stated, int | float) and isinstance(computed, int | float):
        return abs(stated - computed) <= relative * max(abs(stated), abs(computed))
    if isinstance(stated, dict) and isinstance(computed, dict):
        return stated.keys() == computed.keys() and all(agrees(stated[k], computed[k], relative) for k in stated)
    if isinstance(stated, list | tuple) and isinstance(computed, list | tuple):
        return len(stated) == len(computed) and all(map(agrees, stated, computed))
    return bool(stated == computed)


def _full_parameter(subject: Subject) -> bool | None:
    claim = subject.coverage.get("claim") if isinstance(subject.coverage, dict) else None
    return True if isinstance(claim, dict) and claim.get("full_parameter") == "supported" else None


def _last_evaluation(subject: Subject, what: str) -> Any:
    evals = subject.history.evals
    if not evals or evals[-1].step != subject.history.last_step:
        return None
    return evals[-1].loss.get("lm") if what == "loss" else evals[-1].score
