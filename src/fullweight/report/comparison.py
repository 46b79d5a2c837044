"""A comparison as text for the terminal, as one dict for JSON, and as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plotly import graph_objects
from plotly.io import to_html

from fullweight.evidence.compare import Comparison, Interval, Side, aligned, relative
from fullweight.evidence.curves import HELD_OUT, LOSS
from fullweight.evidence.ledger import finite
from fullweight.evidence.parting import Parting
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
    verdicts = [f"{pair.a}, {pair.b}: {pair.told}" for pair in comparison.pairs]
    verdicts += [str(parting) for parting in partings if parting is not None]
    write_page(
        path,
        _TEMPLATE,
        names=[side.name for side in sides],
        comparison=comparison,
        verdicts=verdicts,
        pictures=pictures,
        costs=cost_rows(comparison),
        runs=[(side.name, facts_of(side)) for side in sides],
    )


def _losses(comparison: Comparison, sides: Sequence[Side]) -> str:
    figure = graph_objects.Figure()
    for side in sides:
        for metric, mode in ((LOSS, "lines"), (HELD_OUT, "markers")):
            series = side.mean(metric)
            if series is not None:
                label = side.name if metric == LOSS else f"{side.name}, held out"
                figure.add_scatter(x=series.steps.tolist(), y=series.values.tolist(), mode=mode, name=label)
    figure.update_layout(xaxis_title="step", yaxis_title="loss, nats per token")
    return _drawn(figure, with_library=True)


def _differences(comparison: Comparison, sides: Sequence[Side]) -> str:
    figure = graph_objects.Figure()
    for other in sides[1:]:
        both = aligned(sides[0], other, LOSS, comparison.window)
        assert both is not None
        apart = relative(both[0].values, both[1].values)
        figure.add_scatter(x=both[0].steps.tolist(), y=apart.tolist(), mode="lines", name=other.name)
    figure.add_hline(y=comparison.tolerance, line_dash="dash", annotation_text="tolerance")
    figure.update_layout(xaxis_title="step", yaxis_title=f"|b - {sides[0].name}| / |{sides[0].name}|")
    figure.update_yaxes(type="log")
    return _drawn(figure, with_library=False)


def _drawn(figure: graph_objects.Figure, *, with_library: bool) -> str:
    figure.update_layout(height=380, margin={"l": 60, "r": 20, "t": 20, "b": 50}, template="plotly_white")
    text: str = to_html(figure, full_html=False, include_plotlyjs=with_library, config={"displaylogo": False})
    return text


def _told(value: Interval | None, *, percent: bool = False) -> str:
    if value is None:
        return _UNKNOWN
    scale, unit = (100.0, " %") if percent else (1.0, "")
    middle = f"{value.mean * scale:,.4g}{unit}"
    if value.low is None or value.high is None:
        return middle
    return f"{middle} [{value.low * scale:,.4g}, {value.high * scale:,.4g}]"
