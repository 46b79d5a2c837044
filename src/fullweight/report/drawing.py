"""How a plotly figure looks in a page: one palette, no background, words in the page's own colour.

The palette can be told apart by colour-blind readers. Figures have no background and `page.html` gives their words
the colour of its text, so that they read on a light page, a dark one and on paper. Legends are below, where they
have room on a phone. Nothing is offered that would send a figure's numbers anywhere.
"""

from __future__ import annotations

from typing import Any

from plotly.graph_objects import Figure
from plotly.io import to_html

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
INK, GRID = "#808890", "rgba(128,136,144,0.25)"
CLEAR = "rgba(0,0,0,0)"
_CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "modeBarButtons": [["toImage", "resetScale2d"]],
}


def dress(figure: Figure, *, height: int = 380) -> Figure:
    """Give a figure the look of the pages; one without words below its axis gets `step`."""
    figure.update_layout(
        template="none",
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"color": INK, "size": 12},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        margin={"l": 56, "r": 16, "t": 32, "b": 44},
        height=height,
        hovermode="closest",
        modebar={"bgcolor": CLEAR, "color": INK, "activecolor": COLOURS[0]},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True, title_standoff=10)
    if figure.layout.xaxis.title.text is None and not any(t.type in ("heatmap", "bar") for t in figure.data):
        figure.update_xaxes(title_text="step")
    return figure


def drawn(figure: Figure, group: str) -> str:
    """The figure as a part of a page that has the library; `data-run` names its group to the page's script."""
    text: str = to_html(figure, full_html=False, include_plotlyjs=False, config=_CONFIG)
    return text.replace('class="plotly-graph-div"', f'class="plotly-graph-div" data-run="{group}"')
