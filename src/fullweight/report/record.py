"""What the page of a run shows, as one dict: numbers of the ledger with the number of the line behind each.

Everything is read from the files of a run folder or a sealed bundle; figures are computed again from the ledger's
tokens and seconds (`evidence/performance.py`), never taken from a summary. The page and `--json` are made from
this dict and nothing else, so they cannot differ. Imports no torch.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fullweight.core.errors import CheckpointError
from fullweight.evidence.bundle import (
    CONFIG,
    COVERAGE,
    LEDGER,
    LIST,
    MANIFEST,
    MODEL,
    MOST_LEDGER_BYTES,
    RefusedError,
    Stated,
    open_plain,
    read_json,
    read_object,
    stated,
)
from fullweight.evidence.kinds import kind_of, layer_of
from fullweight.evidence.lines import Count, EvalLine, EventLine, History, StepLine, read_history
from fullweight.evidence.performance import FlopsRule, performance

FORMAT = 1
_PHASES = ("data", "forward", "backward", "optimizer")
_SAMPLES = re.compile(r"step-\d{1,18}\.json")


class _Side(Stated):
    samples: Count
    tokens: Count
    truncated: Count
    dropped_too_long: Count
    dropped_untrained: Count


class _Source(Stated):
    """What became of one source's records, as an event tells it."""

    name: str
    records: Count
    duplicates: Count
    also_held_out: Count
    train: _Side
    held_out: _Side


class _Answer(Stated):
    """What the model said to one question."""

    question: str
    response: str
    expected: str | None
    correct: bool | None


class _Sums(Stated):
    elements: int = Field(ge=1)
    reached: Count
    changed_master: Count | None
    changed_bf16: Count | None


class _Tensor(_Sums):
    name: str

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            kind_of(name)
        except StopIteration:
            raise ValueError("it is no tensor of the model") from None
        return name


class _Expert(Stated):
    name: str = Field(pattern=r"\.\d{1,9}$")
    routed_tokens: Count | None


class _Finding(Stated):
    code: str
    weight: str
    text: str


class _Claim(Stated):
    full_parameter: str


class _Coverage(Stated):
    """What of coverage.json is shown; `evidence/coverage_report.py` says what it holds."""

    claim: _Claim
    parameters: dict[str, Count]
    first_weights: dict[str, Any]
    totals: _Sums
    findings: list[_Finding]
    tensors: list[_Tensor]
    experts: list[_Expert]


def record(root: Path, verdicts: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything of the run at `root`; `verdicts` are those of a bundle's claims (`fullweight verify`).

    Raises CheckpointError when it is no run or holds no step, RefusedError on lines that are none of a ledger.
    """
    if not (root / LEDGER).is_file():
        raise CheckpointError(f"{root} is neither a run folder nor a bundle: it has no {LEDGER}")
    sealed = (root / LIST).is_file()
    history = read_history(io.BytesIO(_ledger(root, sealed)))
    if not history.steps:
        raise CheckpointError(f"{root / LEDGER} holds no step yet; nothing to report")
    manifest, config = read_object(root, MANIFEST), read_object(root, CONFIG)
    figures = performance(history, FlopsRule.of(read_object(root, MODEL), config))
    return {
        "format": FORMAT,
        "name": root.resolve().name,
        "kind": "bundle" if sealed else "run",
        "run": manifest.get("run"),
        "finished": bool(history.events("finish")),
        "claims": list(verdicts),
        "performance": figures,
        "parameters": history.steps[-1].parameters.model_dump(include={"total", "trained"}),
        "sources": _sources(history),
        "steps": _steps(history),
        "superseded": _superseded(history),
        "evaluations": _evaluations(history),
        "segments": _segments(history),
        "coverage": _coverage(read_object(root, COVERAGE)),
        "samples": _samples(root),
        "config": config,
        "manifest": manifest,
    }


def raw_lines(root: Path) -> list[str]:
    """The ledger's lines as they are, for the page to show what stands behind a figure."""
    return _ledger(root, (root / LIST).is_file()).decode("utf-8").split("\n")[:-1]


def _ledger(root: Path, sealed: bool) -> bytes:
    """The bytes of a sealed ledger; of a run that may still write, those of whole lines."""
    with open_plain(root / LEDGER) as stream:
        content = stream.read(MOST_LEDGER_BYTES)
    return content if sealed else content[: content.rfind(b"\n") + 1]


def _steps(history: History) -> dict[str, Any]:
    """Columns over the steps that stand; `line` is the line of the ledger that each number is from."""
    placed = [(one, one.line) for one in history.live if isinstance(one.line, StepLine)]
    lines = [line for _, line in placed]
    memory = [(line.model_extra or {}).get("memory") or {} for line in lines]
    losses = list(dict.fromkeys(name for line in lines for name in line.loss))
    phases = [p for p in _PHASES if any(p in line.seconds for line in lines)]
    phases += sorted({p for line in lines for p in line.seconds} - {*phases, "total"})
    return {
        "step": [line.step for line in lines],
        "line": [one.number for one, _ in placed],
        "loss": {name: [line.loss.get(name) for line in lines] for name in losses},
        "total_loss": [line.total_loss for line in lines],
        "grad_norm": [line.grad_norm for line in lines],
        "learning_rate": [line.learning_rate for line in lines],
        "tokens": [line.tokens.real for line in lines],
        "tokens_per_second": [line.tokens.real / line.total_seconds for line in lines],
        "mfu": [line.mfu for line in lines],
        "seconds": {p: [line.seconds.get(p, 0.0) for line in lines] for p in phases},
        "total_seconds": [line.total_seconds for line in lines],
        "memory": {
            name: [one.get(name) for one in memory]
            for name in ("resident_bytes", "device_peak_bytes")
            if any(name in one for one in memory)
        },
        "watts": [line.power.watts for line in lines],
        "expert_load": [line.experts.max_over_mean for line in lines],
        "dropped": [line.experts.dropped for line in lines],
        "routing": [line.routing for line in lines],
        "skipped": [line.skipped for line in lines],
    }


def _superseded(history: History) -> dict[str, Any]:
    """Steps that an interruption made void: done, recorded, and done again."""
    gone = [one for one in history.all if one.superseded and isinstance(one.line, StepLine)]
    return {
        "step": [one.line.step for one in gone],
        "line": [one.number for one in gone],
        "total_loss": [one.line.total_loss for one in gone if isinstance(one.line, StepLine)],
    }


def _evaluations(history: History) -> list[dict[str, Any]]:
    return [
        {
            "step": one.line.step,
            "line": one.number,
            "loss": one.line.loss,
            "score": one.line.score,
            "num_scored": one.line.num_scored,
        }
        for one in history.live
        if isinstance(one.line, EvalLine)
    ]


def _segments(history: History) -> list[dict[str, Any]]:
    """Where the run began and went on: step, line, wall clock, and seconds since the line before."""
    found: list[dict[str, Any]] = []
    before: float | None = None
    for one in history.all:
        what = getattr(one.line, "what", None)
        if what in ("start", "resume"):
            gap = None if before is None else one.line.time - before
            found.append(
                {
                    "what": what,
                    "step": one.line.step,
                    "line": one.number,
                    "time": one.line.time,
                    "gap_seconds": gap,
                }
            )
        before = one.line.time
    return found


def _sources(history: History) -> list[dict[str, Any]]:
    """What became of the samples of each source, from the newest event that says so."""
    events = [one.line for one in history.live if isinstance(one.line, EventLine)]
    found = [told for line in events if (told := line.get("data")) is not None]
    if not found:
        return []
    if not isinstance(found[-1], list):
        raise RefusedError("ledger.shape", "an event tells its data by no list")
    return [stated(_Source, value, "an event's data", "ledger.shape").model_dump() for value in found[-1]]


def _coverage(content: dict[str, Any]) -> dict[str, Any] | None:
    """The parts of coverage.json that are drawn: tensors summed by layer and kind, tokens by layer and expert."""
    if not content:
        return None
    found = stated(_Coverage, content, COVERAGE)
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for tensor in found.tensors:
        cell = cells.setdefault((layer_of(tensor.name), kind_of(tensor.name)), {})
        for key in ("elements", "reached", "changed_master", "changed_bf16"):
            cell[key] = cell.get(key, 0) + (getattr(tensor, key) or 0)
    experts = [
        {"layer": layer_of(e.name), "expert": int(e.name.rsplit(".", 1)[1]), "tokens": e.routed_tokens}
        for e in found.experts
    ]
    return {
        "claim": found.claim.full_parameter,
        "parameters": content["parameters"],
        "totals": content["totals"],
        "findings": content["findings"],
        "first_weights": content["first_weights"],
        "cells": [{"layer": layer, "kind": kind, **cell} for (layer, kind), cell in cells.items()],
        "experts": experts,
    }


def _samples(root: Path) -> list[dict[str, Any]]:
    """Questions with the first and the last recorded answer."""
    names = [p.name for p in (root / "samples").glob("step-*.json") if _SAMPLES.fullmatch(p.name)]
    if not names:
        return []
    ordered = sorted(names, key=lambda name: int(name[len("step-") : -len(".json")]))
    first, last = (_answers(root / "samples", name) for name in (ordered[0], ordered[-1]))
    return [{"before": a, "after": b} for a, b in zip(first, last, strict=False)]


def _answers(folder: Path, name: str) -> list[dict[str, Any]]:
    values = read_json(folder, name)
    if not isinstance(values, list):
        raise RefusedError("bundle.json", f"{name} holds no list")
    return [stated(_Answer, value, name).model_dump() for value in values]
