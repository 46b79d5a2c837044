"""The loss of a run as one picture, for where no page can be shown. `document.py` has all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def loss_picture(run: dict[str, Any]) -> Figure:
    """Training loss by component, held-out loss, and the held-out score where there is one."""
    steps, evaluations = run["steps"], run["evaluations"]
    scored = [e for e in evaluations if e["score"] is not None]
    held_out = [e for e in evaluations if "lm" in e["loss"]]
    figure, axes = pyplot.subplots(1, 2 if scored else 1, figsize=(10 if scored else 7, 4), squeeze=False)
    axis: Axes = axes[0][0]
    for name, values in steps["loss"].items():
        if name != "balance":
            _line(axis, steps["step"], values, label=name, alpha=1.0 if name == "lm" else 0.5)
    told = [e["loss"]["lm"] for e in held_out]
    _line(axis, [e["step"] for e in held_out], told, label="lm, held out", marker="o")
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="loss")
    axis.legend(frameon=False)
    if scored:
        _line(axes[0][1], [e["step"] for e in scored], [100 * e["score"] for e in scored], marker="o")
        axes[0][1].set(xlabel="step", ylabel="exact answers, %", title="held-out score", ylim=(-2, 102))
    return figure


def _line(axis: Axes, steps: Sequence[int], values: Sequence[Any], **style: Any) -> None:
    """Draw what is a number; a skipped step has recorded 'nan' or 'inf' and leaves a gap."""
    numbers = [v if isinstance(v, int | float) else float("nan") for v in values]
    axis.plot(steps, numbers, linewidth=1.2, **style)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
