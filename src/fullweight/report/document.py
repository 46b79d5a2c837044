"""One page of one run or several: claims, figures that can be zoomed, and the ledger's lines behind them.

One file that needs no server and no network: the plotting library is inside, once. It follows the reader's light
or dark setting, fits a phone, and prints. What models or strangers wrote is escaped; nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from fullweight.report.figures import figures, together
from fullweight.report.page import write_page

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"
_MOST_LINE_BYTES = 16 * 2**20
"""Ledger lines of a run that the page holds; of longer ledgers it names the numbers of the lines."""
_UNKNOWN = "unknown"


def write_report(
    path: Path, runs: Sequence[dict[str, Any]], lines: Sequence[Sequence[str]], *, live: bool = False
) -> None:
    """Write the page of the runs, each as `record.record` gives it, with the lines of its ledger.

    A `live` page asks its server whether there is more, and loads itself anew (`watch.py`).
    """
    sections = [
        {
            "run": run,
            "headline": headline(run),
            "figures": [(title, _drawn(figure, f"run{number}")) for title, figure in figures(run).items()],
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
        side_by_side=_drawn(together(runs), "all") if len(runs) > 1 else "",
        library=get_plotlyjs(),
        live=live,
    )


def headline(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run comes to, recomputed from its ledger; what is not known says so."""
    found, steps = run["performance"], run["steps"]
    rates, mfu, energy, goodput = (found[name] for name in ("tokens_per_second", "mfu", "energy", "goodput"))
    times = found["step_seconds"]
    open_end = "" if run["finished"] else ", not finished"
    rows = [
        ("steps", f"{found['steps']:,}, {found['skipped']} skipped{open_end}"),
        ("tokens", f"{found['tokens']['real']:,} real, {found['tokens']['padding']:,} padding"),
        ("training loss", f"{_number(steps['loss']['lm'][0])} to {_number(steps['loss']['lm'][-1])}"),
        *_held_out(run),
        ("step", f"{times['median']:.3g} s median, {times['p5']:.3g} to {times['p95']:.3g} s from 5 to 95 %"),
        ("tokens per second", f"{rates['overall']:,.0f} over all steps"),
        ("MFU", _mfu(mfu)),
        ("goodput", _goodput(goodput)),
        ("energy", _energy(energy)),
        ("routing", ", ".join(sorted(_routing(run))) or _UNKNOWN),
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
    return rows


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


def _routing(run: dict[str, Any]) -> set[str]:
    return set(run["steps"]["routing"])


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


def _drawn(figure: Figure, group: str) -> str:
    config = {"displaylogo": False, "responsive": True}
    text: str = to_html(figure, full_html=False, include_plotlyjs=False, config=config)
    return text.replace('class="plotly-graph-div"', f'class="plotly-graph-div" data-run="{group}"')
