"""The figures of a plan's page, drawn by plotly from what `answer.describe` gives.

How a figure looks is in `report/drawing.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from fullweight.planner.timeline import KINDS
from fullweight.report.drawing import COLOURS, INK, dress

_GIB = 2**30
CATEGORIES = ("parameters", "optimizer", "gradients", "gathered", "activations", "communication", "temporaries")
_LIMIT = "#c23b36"
_KIND_COLOURS = dict(
    zip(KINDS, ("#56b4e9", "#0072b2", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#7f7f7f"), strict=True)
)


def memory(plan: dict[str, Any]) -> Figure:
    """Stacks of the best layout by pipeline rank; each category at its worst, so a stack may be above its peak."""
    layout = plan["layouts"][0]
    stages = layout["stages"]
    names = [_rank(stage["stage"], len(stages)) for stage in stages]
    figure = Figure()
    for name, colour in zip(CATEGORIES, COLOURS, strict=True):
        sizes = [stage[name] / _GIB for stage in stages]
        figure.add_bar(
            x=sizes, y=names, orientation="h", name=name, marker_color=colour, hovertemplate="%{x:.2f} GiB"
        )
    peaks = [stage["peak"] / _GIB for stage in stages]
    mark = {"symbol": "diamond", "size": 9, "color": "#ffffff", "line": {"width": 1.5, "color": "#000000"}}
    figure.add_scatter(x=peaks, y=names, mode="markers", marker=mark, name="peak", hovertemplate="%{x:.2f} GiB")
    _limit(figure, layout["usable_bytes"] / _GIB, f"limit {layout['usable_bytes'] / _GIB:.1f} GiB")
    figure.update_layout(barmode="stack", xaxis_title="GiB", xaxis_rangemode="tozero", bargap=0.25)
    figure.update_layout(legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", type="category")
    dress(figure, height=190 + 26 * len(stages) + 20)
    _bottom(figure, 110)
    figure.update_layout(margin_t=40)
    return figure


def layouts(plan: dict[str, Any]) -> Figure:
    """Where the seconds of each layout go, beside each other; the line is the interval of its step."""
    found = plan["layouts"]
    names = [f"{number}" for number in range(1, len(found) + 1)]
    figure = Figure()
    words = {term["name"]: term["words"] for layout in found for term in layout["terms"]}
    parts = [name for name in words if any(layout["seconds_by_part"].get(name, 0) > 0 for layout in found)]
    colours = (*COLOURS, "#b0724e", "#4d9078", "#8f7ac9", "#c9b458")
    for name, colour in zip(parts, colours, strict=False):
        seconds = [layout["seconds_by_part"][name] for layout in found]
        hover = f"{words[name]}: %{{x:.3g}} s<extra></extra>"
        figure.add_bar(
            x=seconds, y=names, orientation="h", name=words[name], marker_color=colour, hovertemplate=hover
        )
    middle = [layout["seconds"] for layout in found]
    ends = {
        "type": "data",
        "symmetric": False,
        "array": [layout["interval_seconds"][1] - layout["seconds"] for layout in found],
        "arrayminus": [layout["seconds"] - layout["interval_seconds"][0] for layout in found],
        "color": INK,
    }
    mark = {"color": INK, "size": 6}
    figure.add_scatter(
        x=middle,
        y=names,
        mode="markers",
        marker=mark,
        error_x=ends,
        name="step, between",
        hovertemplate="%{x:.2f} s",
    )
    figure.update_layout(barmode="stack", xaxis_title="seconds", yaxis_title="layout", bargap=0.35)
    figure.update_layout(legend_traceorder="normal")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(autorange="reversed", type="category")
    dress(figure, height=230 + 34 * len(found))
    _bottom(figure, 130)
    return figure


def passing(plan: dict[str, Any]) -> Figure:
    """What each pipeline rank does when; where nothing is drawn it waits."""
    played = plan["timeline"]
    num_ranks = len(played["idle"])
    figure = Figure()
    for kind in KINDS:
        found = [s for s in played["segments"] if s["kind"] == kind]
        if found:
            figure.add_bar(
                base=[s["start"] for s in found],
                x=[s["end"] - s["start"] for s in found],
                y=[_rank(s["rank"], num_ranks) for s in found],
                orientation="h",
                name=kind,
                marker={"color": _KIND_COLOURS[kind], "line": {"width": 0}},
                hovertemplate=f"{kind}: %{{x:.3g}} s, from %{{base:.3g}} s<extra>%{{y}}</extra>",
            )
    figure.update_layout(barmode="overlay", xaxis_title="seconds", bargap=0.15, xaxis_range=[0, played["seconds"]])
    figure.update_yaxes(type="category", categoryorder="array")
    figure.update_yaxes(categoryarray=[_rank(rank, num_ranks) for rank in reversed(range(num_ranks))])
    dress(figure, height=190 + 22 * num_ranks)
    _bottom(figure, 100)
    return figure


def effects(plan: dict[str, Any]) -> Figure:
    """By how much each change would move the step's time."""
    found = [(e["what"], 100 * e["change"]) for e in reversed(plan["sensitivity"])]
    figure = Figure()
    figure.add_bar(
        x=[change for _, change in found],
        y=[_broken(what) for what, _ in found],
        orientation="h",
        marker_color=[COLOURS[1] if change > 0 else COLOURS[2] for _, change in found],
        hovertemplate="%{x:+.1f} %<extra>%{y}</extra>",
        text=[f"{change:+.1f} %" for _, change in found],
        textposition="auto",
        showlegend=False,
    )
    figure.update_layout(xaxis_title="change of the step's time, %")
    dress(figure, height=100 + 42 * len(found))
    return figure


def side_by_side(plans: Sequence[dict[str, Any]]) -> Figure:
    """Seconds, energy, cost (where a price was given) and headroom of each job's first layout.

    Jobs that differ in one number only are a curve over it.
    """
    known = [plan for plan in plans if plan["layouts"]]
    firsts = [plan["layouts"][0] for plan in known]
    kinds = [
        ("seconds a step", [f["seconds"] for f in firsts]),
        ("kWh a step", [f["kwh_per_step"] for f in firsts]),
    ]
    if all(f["cost_per_step"] is not None for f in firsts):
        kinds.append(("cost a step", [f["cost_per_step"] for f in firsts]))
    kinds.append(("GiB of headroom", [(f["usable_bytes"] - f["peak_bytes"]) / _GIB for f in firsts]))
    over = swept(plans)
    places: list[Any] = [plan[over] for plan in known] if over else [_broken(job(plan)) for plan in known]
    figure = make_subplots(rows=2, cols=2, subplot_titles=[title for title, _ in kinds], vertical_spacing=0.24)
    for number, (title, values) in enumerate(kinds):
        row, col = number // 2 + 1, number % 2 + 1
        error = None
        if number == 0:
            error = {
                "type": "data",
                "symmetric": False,
                "array": [f["interval_seconds"][1] - f["seconds"] for f in firsts],
                "arrayminus": [f["seconds"] - f["interval_seconds"][0] for f in firsts],
            }
        style = {
            "name": title,
            "showlegend": False,
            "error_y": error,
            "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
        }
        if over:
            line = {"color": COLOURS[number], "width": 2}
            figure.add_scatter(x=places, y=values, mode="lines+markers", line=line, **style, row=row, col=col)
            figure.update_xaxes(type="log", tickvals=places, title_text=over, row=row, col=col)
        else:
            figure.add_bar(x=places, y=values, marker_color=COLOURS[number], **style, row=row, col=col)
    dress(figure, height=620)
    figure.update_yaxes(rangemode="tozero")
    return figure


def swept(plans: Sequence[dict[str, Any]]) -> str | None:
    """The number in which the jobs differ, where they differ in no other way."""
    for over in ("chips", "sequence"):
        same = ("model", "chip", *(name for name in ("chips", "sequence") if name != over))
        if len({plan[over] for plan in plans}) > 1 and all(len({p[name] for p in plans}) == 1 for name in same):
            return over
    return None


def job(plan: dict[str, Any]) -> str:
    """A job's name beside others."""
    return f"{plan['model']}, {plan['chips']:,} × {plan['chip']}, {plan['sequence']:,} tokens"


def _rank(number: int, num_ranks: int) -> str:
    return "each rank" if num_ranks == 1 else f"stage rank {number}"


def _broken(text: str, width: int = 22) -> str:
    """Words in lines that fit beside a narrow figure."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)


def _bottom(figure: Figure, pixels: int) -> None:
    """Room below for axis and legend, said and not found by drawing, which with some numbers never settles."""
    figure.update_layout(margin_b=pixels)
    figure.update_xaxes(automargin=False)


def _limit(figure: Figure, value: float, text: str) -> None:
    figure.add_vline(x=value, line_dash="dash", line_color=_LIMIT, line_width=2)
    label = {"x": value, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right"}
    figure.add_annotation(text=text, showarrow=False, font_color=_LIMIT, **label)
