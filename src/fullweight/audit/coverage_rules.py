"""Rules about coverage: that `coverage.json` speaks of this run, and says what its checkpoint shows when measured.

Which findings refute full-parameter training (a frozen matrix, an expert that no token reached, an update of low
rank, an export with other values) is `evidence/coverage_report.py`'s to say; here it is measured again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fullweight.audit.rule import NotCheckableError, rule
from fullweight.audit.subject import Subject
from fullweight.checkpoint.manifest import verify
from fullweight.core.errors import FullweightError
from fullweight.evidence.bundle import COVERAGE
from fullweight.evidence.coverage_report import differences, report
from fullweight.train.coverage import measure_run
from fullweight.train.run_folder import RunFolder


@rule(
    "coverage.totals",
    proves="coverage.json is of a checkpoint of this run, and of as many parameters as the model has",
)
def _totals(subject: Subject) -> Iterator[str]:
    stated = _stated(subject)
    key = (stated.get("generation"), stated.get("manifest_sha256"))
    entry = next((c for c in subject.checkpoints if (c.name, c.manifest_sha256) == key), None)
    if entry is None:
        yield f"{COVERAGE} is of {str(key[0])[:40]}, which is no checkpoint of the run"
    elif entry.step != stated.get("step"):
        yield f"{COVERAGE} says step {str(stated.get('step'))[:20]}, {entry.name} is of step {entry.step}"
    expected = subject.manifest.parameters.model_dump()
    if stated.get("parameters") != expected:
        yield f"{COVERAGE} counts {str(stated.get('parameters'))[:80]}, the manifest {expected}"
    tensors = stated.get("tensors")
    rows = [row for row in tensors if isinstance(row, dict)] if isinstance(tensors, list) else []
    counts = [row["elements"] for row in rows if isinstance(row.get("elements"), int)]
    if sum(counts) != subject.manifest.parameters.total:
        yield f"the tensors of {COVERAGE} have {sum(counts):,} elements, the model {expected['total']:,}"


@rule(
    "coverage.recomputed",
    proves="measured again from the checkpoint and the first weights, coverage is what coverage.json says, tensor "
    "by tensor and expert by expert",
    cannot="that an update was not made elsewhere and put in: replay is for that",
)
def _recomputed(subject: Subject) -> Iterator[str]:
    stated = _stated(subject)
    if not (held := subject.at_hand()):
        raise NotCheckableError("no checkpoint is at hand: give the folder of the run with --run")
    path = next((path for entry, path in held if entry.name == stated.get("generation")), None)
    if path is None:
        raise NotCheckableError(f"the checkpoint that {COVERAGE} is of is not at hand")
    try:
        generation = verify(path)
        if subject.run is None and generation.manifest.facts.config["model"]["checkpoint"] is not None:
            raise NotCheckableError("the run began with a checkpoint: give the folder of the run with --run")
        folder = RunFolder(subject.run or subject.bundle.root)
        measured = report(measure_run(folder, generation=generation))
    except FullweightError as error:
        yield str(error)
        return
    if stated.get("claim") != measured["claim"]:
        refuting = [found for found in measured["findings"] if found["weight"] == "refutes"]
        found = "; ".join(f"{one['code']}: {one['text']}" for one in refuting)
        found = found or measured["claim"]["full_parameter"]
        yield f"{COVERAGE} states {str(stated.get('claim'))[:80]}, measured again: {found}"
    yield from (f"{COVERAGE}: {difference}" for difference in differences(stated, measured))


def _stated(subject: Subject) -> dict[str, Any]:
    if subject.coverage is None:
        raise NotCheckableError(f"the bundle has no {COVERAGE}: run `fullweight coverage` before sealing")
    found: dict[str, Any] = subject.coverage
    return found
