"""What a finished run leaves: exported weights, coverage, pictures, one page, and answers before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fullweight.checkpoint.generations import listed
from fullweight.checkpoint.manifest import Generation, verify
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.receipt import RECEIPT
from fullweight.train.assemble import Run
from fullweight.train.coverage import AT_END_PARAMETERS, measure_run, write_coverage
from fullweight.train.evaluate import Answer
from fullweight.train.export import export
from fullweight.train.progress import Reporter
from fullweight.train.records import Records
from fullweight.train.run_folder import RunFolder

_SHOWN_CHARACTERS = 160


def finish(run: Run, records: Records) -> None:
    """Export, record, measure, draw, print; all ranks together."""
    export(run)
    reporter, generation = records.reporter, _last(run)
    with run.ranks.main_first_failure():
        if run.ranks.is_main:
            _record_end(run, records)
            _cover(run, generation, reporter)
            from fullweight.report.document import write_run  # noqa: PLC0415 - a second, of one rank, at the end

            write_run(run.folder.root, run.folder.report, run.folder.picture)
            _show_before_after(run.folder, run.config.eval.show, reporter)
            if run.config.export.enabled:
                reporter.say(f"weights: {run.folder.export}")
            reporter.say(f"report: {run.folder.report}")


def _record_end(run: Run, records: Records) -> None:
    """What was exported, by the digest of the receipt that lists every tensor's, and that this is the end."""
    step = run.state.step
    if run.config.export.enabled:
        receipt = (run.folder.export / RECEIPT).read_bytes()
        totals = json.loads(receipt)["totals"]["written"]
        found = {"receipt_sha256": hashlib.sha256(receipt).hexdigest(), **totals}
        records.write("event", step, {"what": "export", "format": run.config.export.format, **found})
    records.write("event", step, {"what": "finish", "steps": step, "tokens": run.state.tokens})
    records.sync()


def _last(run: Run) -> Generation | None:
    """The newest checkpoint, verified, of a model that is small enough to be measured; all ranks together."""
    peers = Peers()
    saved = peers.on_main(lambda: listed(run.folder.checkpoints))
    return verify(saved[-1][1], peers) if saved and run.parameters.total <= AT_END_PARAMETERS else None


def _cover(run: Run, generation: Generation | None, reporter: Reporter) -> None:
    """Measure which parameters trained, where that takes no longer than a person would wait."""
    if generation is None:
        reporter.say(f"what trained, tensor by tensor: fullweight coverage {run.folder.root}")
        return
    content = write_coverage(run.folder, measure_run(run.folder, generation=generation))
    totals, changed = content["totals"], content["totals"]["changed_master"]
    reporter.say(
        f"coverage of step {content['step']}: {'unknown' if changed is None else f'{changed:,}'} of "
        f"{totals['elements']:,} parameters changed; full-parameter: {content['claim']['full_parameter']}"
    )
    for finding in content["findings"]:
        if finding["weight"] in ("refutes", "hides"):
            reporter.say(f"{finding['code']}: {finding['text']}")


def show_answers(count: int, answers: Sequence[Answer], reporter: Reporter) -> None:
    """Print a few answers of one evaluation."""
    if not count or not answers:
        return
    table = Table(show_header=True, expand=False)
    for title in ("asked", "answered", "expected", ""):
        table.add_column(title, overflow="fold")
    for answer in answers[:count]:
        table.add_row(
            _short(answer.question), _short(answer.response), _short(answer.expected or ""), _mark(answer.correct)
        )
    reporter.say(table)


def _show_before_after(folder: RunFolder, count: int, reporter: Reporter) -> None:
    steps = sample_steps(folder.samples)
    if len(steps) < 2 or not count:
        return
    before, after = (read_samples(folder.samples, s) for s in (steps[0], steps[-1]))
    if not after:
        return
    table = Table(title=f"held-out questions, before (step {steps[0]}) and after (step {steps[-1]})")
    for title in ("asked", "before", "after", "expected", ""):
        table.add_column(title, overflow="fold")
    for old, new in list(zip(before, after, strict=False))[:count]:
        table.add_row(
            _short(new.question),
            _short(old.response),
            _short(new.response),
            _short(new.expected or ""),
            _mark(new.correct),
        )
    reporter.say(table)


def sample_steps(folder: Path) -> list[int]:
    """Steps at which answers were kept, ascending."""
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("step-*.json"))


def read_samples(folder: Path, step: int) -> list[Answer]:
    """The answers kept at a step."""
    values = json.loads((folder / f"step-{step}.json").read_text(encoding="utf-8"))
    return [Answer(**value) for value in values]


def _short(text: str) -> Text:
    """The end of a text as it is: brackets in it are no markup, and control characters are shown, not obeyed."""
    flat = text if len(text) <= _SHOWN_CHARACTERS else "…" + text[-_SHOWN_CHARACTERS:]
    return Text("".join(c if c.isprintable() or c in "\n\t" else "�" for c in flat))


def _mark(correct: bool | None) -> str:
    return "" if correct is None else "right" if correct else "wrong"
