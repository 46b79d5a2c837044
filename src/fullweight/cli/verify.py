"""`fullweight verify`: check the claims of an evidence bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullweight.cli.files import require_folder
from fullweight.cli.replay import Level
from fullweight.cli.report import write_pages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fullweight.audit.again import Means
    from fullweight.audit.drawn import Replayed, Replaying
    from fullweight.audit.verify import Report

REFUTED, REFUSED = 1, 3
_MARKS = {"holds": "green", "refuted": "red", "not checkable": "yellow"}


def verify_command(
    bundles: Annotated[list[Path], typer.Argument(help="folder that `fullweight seal` wrote; or several")],
    *,
    run: Annotated[Path | None, typer.Option(help="folder of the run, to check its checkpoints too")] = None,
    data: Annotated[bool, typer.Option("--data", help="make every batch of --run again from its data")] = False,
    replay: Annotated[
        int | None, typer.Option(min=1, help="draw so many windows of steps, or layers, and take them again")
    ] = None,
    beacon: Annotated[
        str | None, typer.Option(help="what is drawn with: a public value of later than the bundle (random)")
    ] = None,
    level: Annotated[
        Level, typer.Option(help="what --replay takes again: whole steps, or single layers")
    ] = Level.step,
    boundaries: Annotated[
        Path | None, typer.Option(help="boundaries of one step for --level layer (all that the run stored)")
    ] = None,
    data_files: Annotated[
        Path | None, typer.Option(help="folder with the run's data files for --replay, if not where they were")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="the device for --replay, by its name in recipes, instead of the recorded one"),
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help="write the report of the bundle here too")] = None,
    public_key: Annotated[Path | None, typer.Option(help="key whose signature you trust, in PEM form")] = None,
    chain: Annotated[list[Path] | None, typer.Option(help="trusted certificate; repeatable")] = None,
    identity: Annotated[str | None, typer.Option(help="trusted Sigstore identity (online)")] = None,
    issuer: Annotated[str | None, typer.Option(help="who vouches for --identity")] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="claim or rule that must hold; all: every claim and the signature; repeatable"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything that was found as JSON")] = False,
) -> None:
    """Say of every claim whether it holds, is refuted or cannot be checked.

    With --replay the recorded configuration is trained under for some steps, in a temporary folder.

    Exit status: 0 nothing is refuted and what --require names holds, 1 something is refuted, 2 wrong usage, 3 the
    bundle cannot be read or is refused, or what --require names cannot be checked. Without --require a claim that
    cannot be checked leaves the status 0.
    """
    import json

    from fullweight.audit.again import Means
    from fullweight.audit.signing import Trust
    from fullweight.audit.verify import lacking, required, verify, verify_together
    from fullweight.evidence.bundle import RefusedError

    needed = required(require or [])
    replaying = _asked(replay, beacon, level, boundaries, Means(data=data_files, device=device))
    if (run is not None or data or replaying is not None) and len(bundles) > 1:
        raise typer.BadParameter(f"--run, --data and --replay go with one bundle, found {len(bundles)}")
    if data and run is None:
        raise typer.BadParameter("--data reads the data of the run: give its folder with --run")
    require_folder(page)
    if (identity is None) != (issuer is None):
        raise typer.BadParameter("--identity and --issuer go together")
    trust = Trust(public_key, tuple(chain or ()), identity, issuer)
    try:
        if len(bundles) > 1:
            reports = verify_together(bundles, trust)
        else:
            reports = [verify(bundles[0], run=run, trust=trust, with_data=data, replaying=replaying)]
    except RefusedError as error:
        if as_json:
            typer.echo(json.dumps({"refused": {"rule": error.rule, "reason": error.reason}}, indent=2))
        typer.secho(f"refused: {plain(str(error)).plain}", fg="red", err=True)
        raise typer.Exit(REFUSED) from None
    _tell(reports, as_json)
    if page is not None:
        write_pages(page, bundles, reports)
        typer.echo(f"report: {page}", err=as_json)
    absent = [(report.bundle, name, told) for report in reports for name, told in lacking(report, needed)]
    for bundle, name, reason in absent:
        typer.secho(plain(f"{bundle}: required, does not hold: {name}: {reason}").plain, fg="red", err=True)
    if any(report.refuted for report in reports):
        raise typer.Exit(REFUTED)
    if absent:
        raise typer.Exit(REFUSED)


def _asked(
    count: int | None, beacon: str | None, level: Level, boundaries: Path | None, means: Means
) -> Replaying | None:
    """What --replay asks for; the options that belong to it are refused without it."""
    import secrets

    from fullweight.audit.again import Means
    from fullweight.audit.drawn import Replaying

    if level is Level.step and boundaries is not None:
        raise typer.BadParameter("--boundaries goes with --level layer")
    if level is Level.layer and means.device is not None:
        raise typer.BadParameter("--device goes with whole steps: --level layer takes pieces again on a CPU")
    if count is None:
        if beacon is not None or level is Level.layer or means != Means():
            raise typer.BadParameter(
                "--beacon, --level, --data-files and --device go with --replay N: say how much to take again"
            )
        return None
    return Replaying(count, beacon or secrets.token_hex(16), means, level is Level.layer, boundaries)


def plain(text: str) -> Text:
    """A stranger's text as it is: no markup, and control characters shown, not obeyed."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "�" for c in text))


def shown(value: Any, unit: str | None) -> Text:
    """A claimed value with its unit."""
    number = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(number)[:60]
    return plain(f"{text} {unit or ''}".strip() if value is not None else "unknown")


def _tell(reports: Sequence[Report], as_json: bool) -> None:
    import json

    from rich.console import Console

    if as_json:
        typer.echo(json.dumps([report.as_dict() for report in reports], indent=2))
        return
    for report in reports:
        _print(report, Console(soft_wrap=True))


def _print(report: Report, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from fullweight.audit.rule import Status
    from fullweight.audit.verify import COMPLETENESS

    console.print(plain(f"{report.bundle}: run {report.run}"))
    table = Table(box=None)
    for title in ("claim", "value", "verdict", ""):
        table.add_column(title, overflow="fold")
    for one in report.verdicts:
        mark = Text(one.status.value, _MARKS[one.status.value])
        told = plain("" if one.status is Status.holds else one.told)
        table.add_row(plain(one.claim), shown(one.value, one.unit), mark, told)
    console.print(table)
    for status in (Status.refuted, Status.not_checkable):
        for finding in report.findings:
            if finding.status is status:
                console.print(
                    Text(f"{status.value}: ", _MARKS[status.value]) + plain(f"{finding.rule}: {finding.told}")
                )
    if report.replayed is not None:
        console.print(plain(_drawn(report.replayed)))
    held = sum(f.status is Status.holds for f in report.findings)
    console.print(plain(f"{held} of {len(report.findings)} rules hold"))
    console.print(plain(COMPLETENESS))
    console.print(Text("REFUTED", "bold red") if report.refuted else Text("nothing is refuted", "bold green"))


def _drawn(replayed: Replayed) -> str:
    """How the draw can be repeated, and what came of it."""
    asked, verdict = replayed.asked, replayed.verdict
    told = f"replay: drawn from {replayed.candidates} with --beacon {asked.beacon}, which draws the same again"
    return told if verdict.value is None else f"{told}; {verdict.value}: {verdict.told}"
