"""A run folder in one picture and one page.

Both are drawn from the ledger and the saved answers, nothing else, so that they can be rebuilt at any time
and show what was recorded. The page is one file that needs no network: the pictures are inside it.

Left out: interactive charts; the page has to open anywhere, also in ten years.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fullweight.core.errors import CheckpointError
from fullweight.evidence.ledger import read
from fullweight.report.page import inside, png, write_page

_TEMPLATE = Path(__file__).parent / "templates" / "summary.html"
_SAMPLES_SHOWN = 8
_CUT = {
    "truncated": "truncated",
    "dropped as too long": "dropped_too_long",
    "dropped without a trained token": "dropped_untrained",
}


def build_report(root: Path) -> Path:
    """Write `plots/loss.png`, `plots/throughput.png` and `summary.html` in the run folder; returns the page.

    Raises CheckpointError when the folder has no ledger or no step in it.
    """
    lines = list(read(root / "ledger.jsonl"))
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    if not steps:
        raise CheckpointError(f"{root / 'ledger.jsonl'} holds no step yet; nothing to report")
    plots = root / "plots"
    plots.mkdir(exist_ok=True)
    pictures = {"loss": loss_figure(steps, evaluations), "throughput": throughput_figure(steps)}
    encoded = {}
    for name, figure in pictures.items():
        data = png(figure)
        (plots / f"{name}.png").write_bytes(data)
        encoded[name] = inside(data)
    path = root / "summary.html"
    write_page(
        path,
        _TEMPLATE,
        name=root.name,
        pictures=encoded,
        facts=facts(steps, evaluations) + data_facts(lines),
        evaluations=evaluations,
        comparisons=_comparisons(root),
        config=json.dumps(_json(root / "config.json"), indent=2),
        environment=json.dumps(_json(root / "environment.json"), indent=2),
    )
    return path


def facts(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The numbers at the head of the page, each with its meaning."""
    last = steps[-1]
    # The first step pays for warm caches and compilation; the median is what a step costs.
    typical = steps[1:] or steps
    rows = [
        ("steps", f"{last['step']:,}"),
        ("parameters", _parameters(last["parameters"])),
        ("tokens trained on", f"{last['tokens']['so_far']:,} (padding excluded)"),
        ("stepping time", _duration(sum(s["seconds"]["total"] for s in steps))),
        ("tokens per second", f"{median(s['tokens_per_second'] for s in typical):,.0f} (median)"),
        ("MFU", f"{median(s['mfu'] for s in typical):.1%} (median; {last['mfu_convention']})"),
        ("peak that 100 % stands for", _peak(last["peak"])),
        ("training loss", f"{_number(steps[0]['loss']['lm'])} to {_number(last['loss']['lm'])} (next token)"),
        ("routing", last["routing"]),
        ("experts", _experts(last["experts"])),
        ("steps refused (non-finite)", str(sum(s["skipped"] is not None for s in steps))),
    ]
    if evaluations and evaluations[0]["loss"]:
        first, final = evaluations[0], evaluations[-1]
        rows.append(("held-out loss", f"{_number(first['loss']['lm'])} to {_number(final['loss']['lm'])}"))
        if final["score"] is not None:
            rows.append(
                (
                    "exact answers, held out",
                    f"{first['score']:.1%} to {final['score']:.1%} of {final['num_scored']}",
                )
            )
    return rows


def _experts(load: dict[str, Any]) -> str:
    text = f"load max/mean {load['max_over_mean']:.2f}, dead {load['dead']}"
    return f"{text}, choices dropped {load['dropped']:,}" if load["dropped"] else text


def data_facts(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What became of the samples of each source, from the newest event that says so."""
    found = [line["data"] for line in lines if line["kind"] == "event" and "data" in line]
    return [(f"data: {source['name']}", _source(source)) for source in (found[-1] if found else [])]


def _source(source: dict[str, Any]) -> str:
    parts = [f"{source['records']:,} records", f"{source['duplicates']:,} duplicates"]
    if source["also_held_out"]:
        parts.append(f"{source['also_held_out']:,} with a held-out question")
    for name, side in (("train", source["train"]), ("held out", source["held_out"])):
        if any(side.values()):
            told = ", ".join(f"{side[key]:,} {what}" for what, key in _CUT.items())
            parts.append(f"{name}: {side['samples']:,} samples of {side['tokens']:,} tokens ({told})")
    return "; ".join(parts)


def loss_figure(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Figure:
    """Training loss by component, held-out loss, and the held-out score where there is one."""
    scored = [e for e in evaluations if e["score"] is not None]
    figure, axes = pyplot.subplots(1, 2 if scored else 1, figsize=(10 if scored else 7, 4), squeeze=False)
    axis: Axes = axes[0][0]
    for name in steps[0]["loss"]:
        if name != "balance":
            _line(axis, steps, [s["loss"].get(name) for s in steps], name, alpha=1.0 if name == "lm" else 0.5)
    held_out = [e for e in evaluations if e["loss"]]
    _line(axis, held_out, [e["loss"]["lm"] for e in held_out], "lm, held out", marker="o")
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="loss")
    axis.legend(frameon=False)
    if scored:
        _line(axes[0][1], scored, [100 * e["score"] for e in scored], marker="o")
        axes[0][1].set(xlabel="step", ylabel="exact answers, %", title="held-out score", ylim=(-2, 102))
    return figure


def throughput_figure(steps: list[dict[str, Any]]) -> Figure:
    """Tokens per second, gradient norm and learning rate by step."""
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3))
    for axis, key, title in zip(
        axes,
        ("tokens_per_second", "grad_norm", "learning_rate"),
        ("tokens per second", "gradient norm", "learning rate"),
        strict=True,
    ):
        _line(axis, steps, [s[key] for s in steps])
        axis.set(xlabel="step", title=title)
    return figure


def _line(axis: Axes, lines: list[dict[str, Any]], values: list[Any], label: str = "", **style: Any) -> None:
    """Draw what is a number; a skipped step has recorded 'nan' or 'inf' and leaves a gap."""
    numbers = [v if isinstance(v, int | float) else float("nan") for v in values]
    axis.plot([line["step"] for line in lines], numbers, label=label, linewidth=1.2, **style)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _comparisons(root: Path) -> list[dict[str, Any]]:
    """The first questions with the first and the last recorded answer."""
    files = sorted((root / "samples").glob("step-*.json"), key=lambda p: int(p.stem.removeprefix("step-")))
    if not files:
        return []
    before, after = _json(files[0]), _json(files[-1])
    pairs = list(zip(before, after, strict=False))[:_SAMPLES_SHOWN]
    return [{"before": old, "after": new} for old, new in pairs]


def _peak(peak: dict[str, Any]) -> str:
    return f"{peak['flops_per_second'] / 1e9:,.0f} GFLOP/s ({peak['source']})"


def _parameters(count: dict[str, int]) -> str:
    total, trained = count["total"], count["trained"]
    return f"{total:,}, all trained" if trained == total else f"{trained:,} trained of {total:,}, the rest frozen"


def _number(value: float | str) -> str:
    """A refused step's loss is recorded as the name of what it was."""
    return value if isinstance(value, str) else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
