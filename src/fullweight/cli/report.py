"""`fullweight report`: one page of a run or a bundle, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullweight.cli.files import require_folder, write_text, writing

if TYPE_CHECKING:
    from fullweight.audit.verify import Report


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="run folder or sealed bundle; or several")],
    *,
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    json_file: Annotated[Path | None, typer.Option("--json", help="write the same data here")] = None,
    public_key: Annotated[Path | None, typer.Option(help="key whose signature of a bundle you trust")] = None,
) -> None:
    """Write one page that needs no network: claims, curves, coverage, and the ledger's lines behind them.

    The claims of a bundle are verified first, as `fullweight verify` does without the folder of the run.
    """
    import json

    from fullweight.audit.signing import Trust
    from fullweight.audit.verify import verify
    from fullweight.evidence.bundle import LIST

    require_folder(out, json_file)
    sealed = [(root / LIST).is_file() for root in runs]
    reports = [verify(r, trust=Trust(public_key)) if s else None for r, s in zip(runs, sealed, strict=True)]
    records = write_pages(out, runs, reports)
    if json_file is not None:
        text = json.dumps({"format": 1, "runs": records}, indent=1, allow_nan=False)
        write_text(json_file, text + "\n")
    typer.echo(f"report: {out}")


def write_pages(out: Path, roots: Sequence[Path], reports: Sequence[Report | None]) -> list[dict[str, Any]]:
    """Write one page of runs and bundles, the latter with what was found of them; returns its data."""
    from fullweight.report.document import write_report
    from fullweight.report.record import raw_lines, record

    pairs = zip(roots, reports, strict=True)
    records = [record(root, [] if report is None else _verdicts(report)) for root, report in pairs]
    with writing(out):
        write_report(out, records, [raw_lines(root) for root in roots])
    return records


def _verdicts(report: Report) -> list[dict[str, Any]]:
    """Claims with their verdict, and every rule that does not hold."""
    from fullweight.cli.verify import shown
    from fullweight.report.document import RULE

    found = [
        {
            "name": v.claim,
            "value": shown(v.value, v.unit).plain,
            "status": str(v.status),
            "told": v.told,
            "statement": v.statement,
        }
        for v in report.verdicts
    ]
    rules = [
        {"name": f.rule, "value": "", "status": str(f.status), "told": f.told, "statement": RULE}
        for f in report.findings
        if str(f.status) != "holds"
    ]
    return found + rules
