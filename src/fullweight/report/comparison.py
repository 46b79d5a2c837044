"""A comparison as text for the terminal, as one dict for JSON, and as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plotly import graph_objects
from plotly.offline import get_plotlyjs

from fullweight.evidence.compare import Comparison, Interval, Side, aligned, relative
from fullweight.evidence.curves import HELD_OUT, LOSS
from fullweight.evidence.ledger import finite
from fullweight.evidence.parting import Parting
from fullweight.report.drawing import COLOURS, INK, drawn, dress
from fullweight.report.page import write_page

_TEMPLATE = Path(__file__).parent / "templates" / "compare.html"
_UNKNOWN = "unknown"


def described(comparison: Comparison, sides: Sequence[Side], partings: Sequence[Parting | None]) -> dict[str, Any]:
    """Everything for JSON: verdicts, differences, costs, runs, and the aligned losses themselves."""
    pairs = []
    for pair, other, parting in zip(comparison.pairs, sides[1:], partings, strict=True):
        both = aligned(sides[0], other, LOSS, comparison.window)
        assert both is not None
        apart = relative(both[0].values, both[1].values)
        curve = {
            "steps": both[0].steps.tolist(),
            "a": both[0].values.tolist(),
            "b": both[1].values.tolist(),
            "relative": apart.tolist(),
        }
        weights = None if parting is None else {**asdict(parting), "told": str(parting)}
        pairs.append({**asdict(pair), "loss": curve, "weights": weights})
    runs = {side.name: [{"path": str(c.path), "kind": c.kind, **c.facts} for c in side.curves] for side in sides}
    return finite({**asdict(comparison), "pairs": pairs, "runs": runs})


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each side."""
    goal = (
        f"to {comparison.target_metric} {comparison.target:.4g}" if comparison.target is not None else "to target"
    )
    rows = [["", "s a step", "tokens/s", "MFU", "J/token", f"s {goal}", f"steps {goal}"]]
    for name, costs in comparison.costs.items():
        rows.append(
            [
                name,
                _told(costs.step_seconds),
                _told(costs.tokens_per_second),
                _told(costs.mfu, percent=True),
                _told(costs.joules_per_token),
                _told(costs.seconds_to_target),
                _told(costs.steps_to_target),
            ]
        )
    return rows


def facts_of(side: Side) -> str:
    """What is known of the runs of a side, in one line."""
    first = side.curves[0]
    known = [f"{name} {value}" for name, value in first.facts.items() if name != "seed"]
    seeds = [str(curve.facts["seed"]) for curve in side.curves if "seed" in curve.facts]
    known += [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"] if seeds else []
    return "; ".join(known) or f"{first.kind}, nothing recorded beside the numbers"


def write_comparison(
    path: Path, comparison: Comparison, sides: Sequence[Side], partings: Sequence[Parting | None]
) -> None:
    """Write the page."""
    pictures = {"loss": _losses(comparison, sides), "difference": _differences(comparison, sides)}
    write_page(
        path,
        _TEMPLATE,
        names=[side.name for side in sides],
        comparison=comparison,
        weights=[None if parting is None else str(parting) for parting in partings],
        pictures=pictures,
        library=get_plotlyjs(),
        costs=cost_rows(comparison),
        runs=[(side.name, facts_of(side)) for side in sides],
    )


def _losses(comparison: Comparison, sides: Sequence[Side]) -> str:
    """A side is one colour: its training loss as a line, its held-out loss as marks."""
    figure = graph_objects.Figure()
    for number, side in enumerate(sides):
        for metric, mode in ((LOSS, "lines"), (HELD_OUT, "markers")):
            series = side.mean(metric)
            if series is not None:
                label = side.name if metric == LOSS else f"{side.name}, held out"
                _add(figure, series.steps.tolist(), series.values.tolist(), label, number, mode)
    figure.update_layout(xaxis_title="step", yaxis_title="nats per token")
    return drawn(dress(figure), "loss")


def _differences(comparison: Comparison, sides: Sequence[Side]) -> str:
    figure = graph_objects.Figure()
    for number, other in enumerate(sides[1:], 1):
        both = aligned(sides[0], other, LOSS, comparison.window)
        assert both is not None
        apart = relative(both[0].values, both[1].values)
        _add(figure, both[0].steps.tolist(), apart.tolist(), other.name, number, "lines")
        span = [int(both[0].steps[0]), int(both[0].steps[-1])]
        if number == 1 and comparison.tolerance > 0:  # a logarithmic axis has no 0
            line = {"color": INK, "dash": "dash"}
            figure.add_scatter(x=span, y=[comparison.tolerance] * 2, mode="lines", name="tolerance", line=line)
    figure.update_layout(xaxis_title="step", yaxis_title=f"|b - a| / a, a: {sides[0].name}", showlegend=True)
    figure.update_yaxes(type="log", dtick=1, tickformat="~g")
    return drawn(dress(figure), "difference")


def _add(
    figure: graph_objects.Figure, steps: list[int], values: list[float], name: str, number: int, mode: str
) -> None:
    colour = COLOURS[number % len(COLOURS)]
    style = {"line": {"color": colour, "width": 1.6}, "marker": {"color": colour, "size": 8}}
    figure.add_scatter(x=steps, y=values, mode=mode, name=name, **style)


def _told(value: Interval | None, *, percent: bool = False) -> str:
    if value is None:
        return _UNKNOWN
    scale, unit = (100.0, " %") if percent else (1.0, "")
    middle = f"{value.mean * scale:,.4g}{unit}"
    if value.low is None or value.high is None:
        return middle
    return f"{middle} [{value.low * scale:,.4g}, {value.high * scale:,.4g}]"
