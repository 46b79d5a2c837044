"""The figures of a run's page, drawn by plotly from what `record.py` gives.

Every point of a step carries the number of its ledger line as custom data: hovering shows it, and the page opens
that line when the point is clicked. How a figure looks is in `drawing.py`. Two evaluations are two marks: nothing
is known of the way between them, so no line is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly import graph_objects
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from fullweight.report.drawing import COLOURS, INK, dress

_GIB = 2**30
LEARNT = ("Loss", "Held-out score")


def figures(run: dict[str, Any]) -> dict[str, Figure]:
    """Figures by title, in the order of the page; those for which the run has no numbers are left out."""
    drawn = {
        LEARNT[0]: _loss(run),
        LEARNT[1]: _score(run),
        "Tokens per second and MFU": _rates(run),
        "Gradient norm and learning rate": _descent(run),
        "Time by phase": _phases(run),
        "Memory": _memory(run),
        "Expert load": _experts(run),
        "Coverage by layer and kind": _coverage(run),
        "Power": _power(run),
    }
    found = {title: figure for title, figure in drawn.items() if figure is not None}
    for figure in found.values():
        dress(figure)
    return found


def together(runs: Sequence[dict[str, Any]]) -> Figure:
    """The losses of several runs on one pair of axes; `meta` is the number of the run."""
    figure = Figure()
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        _points(figure, run["steps"], run["steps"]["loss"]["lm"], run["name"], colour, meta=number)
        held = [e for e in run["evaluations"] if "lm" in e["loss"]]
        table = {"step": [e["step"] for e in held], "line": [e["line"] for e in held]}
        label = f"{run['name']}, held out"
        _points(figure, table, [e["loss"]["lm"] for e in held], label, colour, mode="markers", meta=number)
    figure.update_layout(yaxis_title="lm, nats per token")
    dress(figure)
    return figure


def _loss(run: dict[str, Any]) -> Figure:
    """Losses by component, held-out loss, and what was done twice, in grey."""
    figure, steps = Figure(), run["steps"]
    if run["superseded"]["step"]:
        _points(figure, run["superseded"], run["superseded"]["total_loss"], "done twice", INK, mode="markers")
    losses = sorted(steps["loss"].items(), key=lambda named: named[0] != "lm")  # what is judged is first
    for colour, (name, values) in zip(COLOURS, losses, strict=False):
        shown = "legendonly" if name == "balance" else True
        width, above = (2.4, 1) if name == "lm" else (1.6, 0)
        _points(figure, steps, values, name, colour, visible=shown, line_width=width, zorder=above)
    held = [e for e in run["evaluations"] if "lm" in e["loss"]]
    table = {"step": [e["step"] for e in held], "line": [e["line"] for e in held]}
    _points(figure, table, [e["loss"]["lm"] for e in held], "lm, held out", INK, mode=_joined(held))
    figure.update_layout(yaxis_title="nats per token")
    _interruptions(figure, run)
    return figure


def _joined(evaluations: list[dict[str, Any]]) -> str:
    return "lines+markers" if len(evaluations) > 2 else "markers"


def _score(run: dict[str, Any]) -> Figure | None:
    scored = [e for e in run["evaluations"] if e["score"] is not None]
    if len(scored) < 3:  # the head of the page says first and last
        return None
    figure = Figure()
    table = {"step": [e["step"] for e in scored], "line": [e["line"] for e in scored]}
    _points(figure, table, [100 * e["score"] for e in scored], "score", COLOURS[0], mode="lines+markers")
    figure.update_layout(yaxis_title="exact answers, %", yaxis_range=[-3, 103])
    return figure


def _rates(run: dict[str, Any]) -> Figure:
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    _points(figure, run["steps"], run["steps"]["tokens_per_second"], "tokens/s", COLOURS[0])
    mfu = [None if value is None else 100 * value for value in run["steps"]["mfu"]]
    _points(figure, run["steps"], mfu, "MFU, %", COLOURS[1], secondary_y=True, line_dash="dot")
    figure.update_yaxes(title_text="tokens/s", rangemode="tozero", secondary_y=False)
    figure.update_yaxes(title_text="MFU, %", rangemode="tozero", showgrid=False, tickmode="auto", secondary_y=True)
    _interruptions(figure, run)
    return figure


def _descent(run: dict[str, Any]) -> Figure:
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    _points(figure, run["steps"], run["steps"]["grad_norm"], "gradient norm", COLOURS[2])
    _points(figure, run["steps"], run["steps"]["learning_rate"], "learning rate", COLOURS[3], secondary_y=True)
    figure.update_yaxes(title_text="gradient norm", type="log", secondary_y=False)
    figure.update_yaxes(
        title_text="learning rate", rangemode="tozero", showgrid=False, tickmode="auto", secondary_y=True
    )
    return figure


def _phases(run: dict[str, Any]) -> Figure:
    """Seconds of each step, by phase, one on the other."""
    figure = Figure()
    for colour, (name, values) in zip(COLOURS, run["steps"]["seconds"].items(), strict=False):
        _points(figure, run["steps"], values, name, colour, stackgroup="time", line_width=0.5)
    figure.update_layout(yaxis_title="seconds a step")
    _interruptions(figure, run)
    return figure


def _memory(run: dict[str, Any]) -> Figure | None:
    if not run["steps"]["memory"]:
        return None
    figure = Figure()
    for colour, (name, values) in zip(COLOURS, run["steps"]["memory"].items(), strict=False):
        label = name.removesuffix("_bytes").replace("_", " ")
        _points(figure, run["steps"], [None if v is None else v / _GIB for v in values], label, colour)
    figure.update_layout(yaxis_title="GiB", yaxis_rangemode="tozero")
    return figure


def _experts(run: dict[str, Any]) -> Figure | None:
    """Tokens of the whole run by layer and expert, over the layer's mean."""
    experts = (run["coverage"] or {}).get("experts") or []
    if not experts or any(e["tokens"] is None for e in experts):
        return None
    layers = list(dict.fromkeys(e["layer"] for e in experts))
    rows = [
        [e["tokens"] for e in sorted(experts, key=lambda e: e["expert"]) if e["layer"] == name] for name in layers
    ]
    means = [sum(row) / len(row) or 1.0 for row in rows]
    shares = [[tokens / mean for tokens in row] for row, mean in zip(rows, means, strict=True)]
    heat = graph_objects.Heatmap(
        z=shares,
        x=list(range(len(rows[0]))),
        y=layers,
        customdata=rows,
        hovertemplate="%{y}, expert %{x}: %{customdata:,} tokens, %{z:.2f} of the mean<extra></extra>",
        colorscale="Cividis",
        zmin=0,
        zmax=max(max(row) for row in shares),
        colorbar_title="of mean",
    )
    figure = Figure(heat)
    figure.update_layout(xaxis_title="expert", yaxis_autorange="reversed")
    return figure


def _coverage(run: dict[str, Any]) -> Figure | None:
    """Share of elements whose fp32 master changed; hovering tells the rest."""
    cells = (run["coverage"] or {}).get("cells") or []
    if not cells:
        return None
    layers, kinds = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("layer", "kind"))
    by_place = {(cell["layer"], cell["kind"]): cell for cell in cells}
    values: list[list[float | None]] = []
    told: list[list[str]] = []
    for layer in layers:
        row = [by_place.get((layer, kind)) for kind in kinds]
        values.append([None if c is None else 100 * c["changed_master"] / c["elements"] for c in row])
        told.append(["" if c is None else _cell(c) for c in row])
    heat = graph_objects.Heatmap(
        z=values,
        x=kinds,
        y=layers,
        text=told,
        hovertemplate="%{y}, %{x}<br>%{text}<extra></extra>",
        colorscale="Cividis",
        zmin=0,
        zmax=100,
        colorbar_title="% changed",
    )
    figure = Figure(heat)
    figure.update_layout(yaxis_autorange="reversed")
    return figure


def _cell(cell: dict[str, Any]) -> str:
    shares = {name: 100 * cell[name] / cell["elements"] for name in ("changed_master", "changed_bf16", "reached")}
    return (
        f"{cell['elements']:,} elements<br>changed in fp32 {shares['changed_master']:.2f} %, in BF16 "
        f"{shares['changed_bf16']:.2f} %<br>a gradient reached {shares['reached']:.2f} %"
    )


def _power(run: dict[str, Any]) -> Figure | None:
    if all(value is None for value in run["steps"]["watts"]):
        return None
    figure = Figure()
    _points(figure, run["steps"], run["steps"]["watts"], "power", COLOURS[4])
    figure.update_layout(yaxis_title="watts", yaxis_rangemode="tozero")
    return figure


def _points(
    figure: Figure,
    table: dict[str, Any],
    values: list[Any],
    name: str,
    colour: str,
    *,
    mode: str = "lines",
    secondary_y: bool | None = None,
    line_width: float = 1.6,
    line_dash: str = "solid",
    **more: Any,
) -> None:
    """Add numbers by step; what is not finite, which a ledger writes as its name, leaves a gap."""
    numbers = [value if isinstance(value, int | float) else None for value in values]
    trace = graph_objects.Scatter(
        x=table["step"],
        y=numbers,
        customdata=table["line"],
        name=name,
        mode=mode,
        line={"color": colour, "width": line_width, "dash": line_dash},
        marker={"color": colour, "size": 7},
        hovertemplate="step %{x}: %{y:.6g}<extra>" + name + ", ledger line %{customdata}</extra>",
        **more,
    )
    figure.add_trace(trace, **({} if secondary_y is None else {"secondary_y": secondary_y}))


def _interruptions(figure: Figure, run: dict[str, Any]) -> None:
    """A mark at each step to which the run went back."""
    for segment in run["segments"][1:]:
        figure.add_vline(
            x=segment["step"],
            line_dash="dot",
            line_color=INK,
            annotation_text=f"{segment['what']}, line {segment['line']}",
            annotation_font_size=10,
        )
