"""One page of one run or several: claims, figures that can be zoomed, and the ledger's lines behind them.

One file that needs no server and no network: the plotting library is inside, once. It follows the reader's light
or dark setting, fits a phone, and prints. What models or strangers wrote is escaped; nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fullweight.report.drawing import drawn
from fullweight.report.figures import LEARNT, figures, together
from fullweight.report.page import png, write_page
from fullweight.report.picture import loss_picture
from fullweight.report.record import raw_lines, record

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"
_MOST_LINE_BYTES = 16 * 2**20
"""Ledger lines of a run that the page holds; of longer ledgers it names the numbers of the lines."""
_UNKNOWN = "unknown"
_CUT = {
    "truncated": "truncated",
    "dropped as too long": "dropped_too_long",
    "dropped without a trained token": "dropped_untrained",
}


_ORDER = {"refuted": 0, "holds": 1}
RULE = "a rule of verification"  # in place of a claim's statement
_LOSSES = {
    "lm": "of the next token, which is what is learnt",
    "mtp": "of the token after it, by the extra prediction layers",
    "indexer": "how far the sparse attention's choice is from the whole attention",
    "balance": "how unevenly tokens go to experts; hidden until its name is clicked",
}


def write_report(
    path: Path, runs: Sequence[dict[str, Any]], lines: Sequence[Sequence[str]], *, live: bool = False
) -> None:
    """Write the page of the runs, each as `record.record` gives it, with the lines of its ledger.

    A `live` page asks its server whether there is more, and loads itself anew (`watch.py`).
    """
    sections = [
        {
            "run": run,
            "verdict": _verdict(run),
            "tiles": _tiles(run),
            "losses": [pair for pair in _LOSSES.items() if pair[0] in run["steps"]["loss"]],
            "claims": sorted(run["claims"], key=lambda claim: _ORDER.get(claim["status"], len(_ORDER))),
            "headline": headline(run),
            **_figures(run, f"run{number}"),
            "lines": _embedded(lines[number]),
            "config": json.dumps(run["config"], indent=2),
            "manifest": json.dumps(run["manifest"], indent=2),
        }
        for number, run in enumerate(runs)
    ]
    write_page(
        path,
        _TEMPLATE,
        title=" beside ".join(run["name"] for run in runs),
        sections=sections,
        side_by_side=drawn(together(runs), "all") if len(runs) > 1 else "",
        library=get_plotlyjs(),
        live=live,
    )


def write_run(root: Path, page: Path, picture: Path) -> None:
    """What a run leaves for a person: its page, and its loss as one picture for where no page can be shown."""
    found = record(root)
    write_report(page, [found], [raw_lines(root)])
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(png(loss_picture(found)))


def headline(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run comes to, recomputed from its ledger; what is not known says so."""
    found, steps = run["performance"], run["steps"]
    rates, mfu, energy, goodput = (found[name] for name in ("tokens_per_second", "mfu", "energy", "goodput"))
    times = found["step_seconds"]
    open_end = "" if run["finished"] else ", not finished"
    rows = [
        ("steps", f"{found['steps']:,}, {found['skipped']} skipped{open_end}"),
        ("parameters", _parameters(run["parameters"])),
        ("tokens", f"{found['tokens']['real']:,} real, {found['tokens']['padding']:,} padding"),
        ("training loss", f"{_number(steps['loss']['lm'][0])} to {_number(steps['loss']['lm'][-1])}"),
        *_held_out(run),
        ("step", f"{times['median']:.3g} s median, {times['p5']:.3g} to {times['p95']:.3g} s from 5 to 95 %"),
        ("tokens per second", f"{rates['overall']:,.0f} over all steps"),
        ("MFU", _mfu(mfu)),
        ("goodput", _goodput(goodput)),
        ("energy", _energy(energy)),
        ("routing", _routing(steps)),
    ]
    coverage = run["coverage"]
    if coverage is None:
        rows.append(("full-parameter", "not measured: `fullweight coverage` does"))
    else:
        totals = coverage["totals"]
        reached = 100 * totals["reached"] / totals["elements"]
        told = f"{coverage['claim']}; gradients reached {reached:.2f} % of {totals['elements']:,} elements"
        if totals["changed_master"] is not None:
            told += f", {100 * totals['changed_master'] / totals['elements']:.2f} % changed in fp32"
        rows.append(("full-parameter", told))
    return [*rows, *((f"data: {source['name']}", _source(source)) for source in run["sources"])]


def _verdict(run: dict[str, Any]) -> tuple[str, str]:
    """What verification found, in a sentence, with the class of its colour."""
    if run["kind"] != "bundle":
        return "unsure", "Not verified: this is a run's own folder."
    by_status = {status: [c["name"] for c in run["claims"] if c["status"] == status] for status in _ORDER}
    rest = len(run["claims"]) - sum(map(len, by_status.values()))
    held = len(by_status["holds"])
    hold = "1 claim holds" if held == 1 else f"{held} claims hold"
    what = "claim or rule" if rest == 1 else "claims and rules"
    open_end = f"; {rest} {what} cannot be checked with what was at hand" if rest else ""
    if by_status["refuted"]:
        return "refuted", f"Refuted: {_refuted(run)}. {hold[0].upper() + hold[1:]}{open_end}."
    return "holds", f"Nothing is refuted: {hold}{open_end}."


def _refuted(run: dict[str, Any]) -> str:
    """Rules that do not hold and claims that fall by themselves, by name; how many claims stood on those rules."""
    refuted = [c for c in run["claims"] if c["status"] == "refuted"]
    rules = [c["name"] for c in refuted if c["statement"] == RULE]
    fallen = [c["name"] for c in refuted if c["statement"] != RULE]
    alone = [c["name"] for c in refuted if c["name"] in fallen and c["told"].partition(":")[0] not in rules]
    told = ", ".join([*rules, *alone])
    behind = len(fallen) - len(alone)
    return told if not behind else f"{told}, and with {'it' if len(rules) == 1 else 'them'} {behind} claims"


def _tiles(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a reader asks first: title, value, and what the value is of."""
    held = [e for e in run["evaluations"] if "lm" in e["loss"]]
    scored = [e for e in run["evaluations"] if e["score"] is not None]
    found = run["performance"]
    tiles = []
    if scored:
        first, last = (f"{100 * e['score']:.1f} %" for e in (scored[0], scored[-1]))
        tiles.append(
            ("held-out score", f"{first} → {last}", f"of {scored[-1]['num_scored']} questions, exact answers")
        )
    if held:
        title, losses = "held-out loss", [e["loss"]["lm"] for e in held]
    else:
        title, losses = "training loss", run["steps"]["loss"]["lm"]
    tiles.append((title, f"{_number(losses[0])} → {_number(losses[-1])}", "nats per token"))
    count = run["parameters"]
    share = 100 * count["trained"] / count["total"]
    tiles.append(("trained", f"{share:.4g} %", f"of {count['total']:,} parameters"))
    hours = found["goodput"]["wall_seconds"] / 3600
    length = f"{60 * hours:.3g} min" if hours < 2 else f"{hours:,.1f} h"
    length = f"{3600 * hours:.3g} s" if hours < 1 / 30 else length
    tiles.append(("length", f"{found['steps']:,} steps", f"{found['tokens']['real']:,} tokens, {length}"))
    return tiles


def _parameters(count: dict[str, int]) -> str:
    total, trained = count["total"], count["trained"]
    return f"{total:,}, all trained" if trained == total else f"{trained:,} trained of {total:,}, the rest frozen"


def _source(source: dict[str, Any]) -> str:
    """What became of the samples of a source; a side without samples is left out."""
    parts = [f"{source['records']:,} records", f"{source['duplicates']:,} duplicates"]
    if source["also_held_out"]:
        parts.append(f"{source['also_held_out']:,} with a held-out question")
    for name, side in (("train", source["train"]), ("held out", source["held_out"])):
        if any(side.values()):
            told = ", ".join(f"{side[key]:,} {what}" for what, key in _CUT.items())
            parts.append(f"{name}: {side['samples']:,} samples of {side['tokens']:,} tokens ({told})")
    return "; ".join(parts)


def _held_out(run: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    held = [e for e in run["evaluations"] if "lm" in e["loss"]]
    if held:
        rows.append(("held-out loss", f"{_number(held[0]['loss']['lm'])} to {_number(held[-1]['loss']['lm'])}"))
    scored = [e for e in run["evaluations"] if e["score"] is not None]
    if scored:
        told = (
            f"{100 * scored[0]['score']:.1f} % to {100 * scored[-1]['score']:.1f} % of {scored[-1]['num_scored']}"
        )
        rows.append(("held-out score", told))
    return rows


def _routing(steps: dict[str, Any]) -> str:
    told = f"{', '.join(sorted(set(steps['routing'])))}; busiest expert {steps['expert_load'][-1]:.2f} of the mean"
    dropped = sum(steps["dropped"])
    return f"{told}, {dropped:,} choices dropped" if dropped else told


def _mfu(mfu: dict[str, Any]) -> str:
    if mfu["overall"] is None:
        return f"{_UNKNOWN}: {mfu['reason']}"
    peaks = "; ".join(f"{flops / 1e12:,.3g} TFLOP/s ({source})" for flops, source in mfu["peaks"])
    return f"{100 * mfu['overall']:.2f} % of {peaks}; {mfu['convention']}"


def _goodput(goodput: dict[str, Any]) -> str:
    if goodput["share"] is None:
        return f"{_UNKNOWN}: {goodput['reason'] or 'no time passed'}"
    told = f"{100 * goodput['share']:.1f} % of {goodput['wall_seconds']:,.0f} s"
    if goodput["interruptions"]:
        told += f", {goodput['interruptions']} interruption(s), {goodput['superseded_steps']} steps done twice"
    return told


def _energy(energy: dict[str, Any]) -> str:
    if energy["joules"] is None:
        return f"{_UNKNOWN}: {energy['reason']}"
    kwh, sources = energy["joules"] / 3.6e6, ", ".join(energy["sources"])
    return f"{energy['joules_per_token']:.3g} J a token, {kwh:,.3g} kWh ({sources})"


def _number(value: float | str | None) -> str:
    """A ledger writes what is not finite as its name."""
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)


def _embedded(lines: Sequence[str]) -> str | None:
    """The lines as JSON that may stand inside a script element; None where they are too many."""
    if sum(map(len, lines)) > _MOST_LINE_BYTES:
        return None
    return json.dumps(list(lines)).replace("<", "\\u003c")


def _figures(run: dict[str, Any], group: str) -> dict[str, list[tuple[str, str]]]:
    """Drawn figures with their titles: what was learnt, which comes before the answers, and how."""
    found = [(title, drawn(figure, group)) for title, figure in figures(run).items()]
    first = [pair for pair in found if pair[0] in LEARNT]
    return {"learnt": first, "figures": [pair for pair in found if pair not in first]}
