"""Curves of training runs, wherever they were recorded: a run folder, a sealed bundle, CSV, TensorBoard.

A `Curve` is a set of series by name, each with its own steps, so that held-out losses need not lie on the steps of
training. Names are those of the ledger; the columns of other frameworks are known by what they usually call them,
and `columns` names what is not. A step that occurs twice counts as its last: a resumed run logs steps again.

Left out: units of others. A column is taken as it is, so an MFU in percent has to be divided by its owner.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullweight.core.errors import DataError
from fullweight.evidence import ledger
from fullweight.evidence.bundle import read_object

LOSS = "lm"
HELD_OUT = "held_out"
WALL = "wall_seconds"

# what others call it: torchtitan, Megatron-LM, NeMo, TRL, Lightning and W&B exports
_KNOWN = {
    "step": ("step", "steps", "iteration", "iter", "global_step", "train_global_step", "trainer_global_step"),
    LOSS: (
        *("lm", "loss", "lm_loss", "loss_lm", "train_loss", "training_loss", "train_lm_loss"),
        *("loss_metrics_global_avg_loss", "reduced_train_loss"),
    ),
    HELD_OUT: ("held_out", "val_loss", "eval_loss", "validation_loss", "eval_loss_lm", "lm_loss_validation"),
    "mtp": ("mtp", "mtp_loss", "loss_mtp", "mtp_1_loss"),
    "grad_norm": ("grad_norm", "gradient_norm", "train_grad_norm"),
    "learning_rate": ("learning_rate", "lr", "train_learning_rate"),
    "tokens_per_second": ("tokens_per_second", "tps", "throughput_tps", "train_tokens_per_second"),
    "seconds": ("seconds", "seconds_total", "step_time", "iteration_time", "time_metrics_end_to_end_s"),
    "mfu": ("mfu",),
    WALL: ("wall_seconds", "wall_time", "elapsed_seconds"),
}


@dataclass(frozen=True)
class Series:
    """One number by step: `steps` ascending and unique, `values` float64, NaN where it was not finite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Series:
        steps = sorted(points)
        values = [points[step] for step in steps]
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Curve:
    """What one run recorded. `kind` is run (folder or bundle), csv or tensorboard."""

    name: str
    path: Path
    kind: str
    series: dict[str, Series]
    losses: tuple[str, ...] = (LOSS,)  # names of the components of the training loss, the language model's first
    facts: dict[str, Any] = field(default_factory=dict)  # commit, chip, ranks, seed, model: where recorded


def read_curve(path: Path, columns: Mapping[str, str] | None = None) -> Curve:
    """The curve at `path`. `columns` maps our names to those in a CSV or TensorBoard log.

    Raises DataError when it is none, has no step or no loss, or a cell is no number (file and line).
    """
    columns = columns or {}
    if (path / "ledger.jsonl").is_file():
        return _of_run(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _foreign(path, "csv", _csv(path), columns)
    if _events(path):
        return _foreign(path, "tensorboard", _tensorboard(path), columns)
    if not path.exists():
        raise DataError(f"nothing at {path}; give a run folder, a bundle, a .csv file or a TensorBoard folder")
    raise DataError(
        f"{path} is no run: no ledger.jsonl, no .csv, no TensorBoard events (events.out.tfevents...) in it"
    )


def _of_run(path: Path) -> Curve:
    lines = list(ledger.read(path / "ledger.jsonl"))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise DataError(f"{path / 'ledger.jsonl'} holds no step yet; compare runs that have begun")
    losses = (LOSS, *(name for name in steps[0]["loss"] if name != LOSS))
    began = lines[0].get("time")
    rows: dict[str, dict[int, float]] = {}
    wall = 0.0
    for line in steps:
        wall += line["seconds"]["total"]
        numbers: dict[str, Any] = {
            **line["loss"],
            **{name: line.get(name) for name in ("total_loss", "grad_norm", "learning_rate", "mfu")},
            "tokens": line["tokens"]["real"],
            "tokens_per_second": line["tokens_per_second"],
            "seconds": line["seconds"]["total"],
            "watts": (line.get("power") or {}).get("watts"),
            WALL: wall if began is None else line["time"] - began,
        }
        for name, value in numbers.items():
            if value is not None:
                rows.setdefault(name, {})[line["step"]] = float(
                    value
                )  # a ledger writes a number that is not finite as its name
    for line in lines:
        if line["kind"] == "eval":
            for name, value in ((HELD_OUT, line["loss"].get(LOSS)), ("score", line.get("score"))):
                if value is not None:
                    rows.setdefault(name, {})[line["step"]] = float(value)
    series = {name: Series.of(points) for name, points in rows.items()}
    return Curve(path.name, path, "run", series, losses, _facts(path))


def _facts(path: Path) -> dict[str, Any]:
    """Where and with what it ran, from the files beside the ledger; what is not there is left out."""
    facts: dict[str, Any] = {}
    held = {name: read_object(path, f"{name}.json") for name in ("manifest", "environment", "config")}
    environment = held["environment"] or held["manifest"].get("environment") or {}
    config = held["config"] or held["manifest"].get("config") or {}
    for name, value in (
        ("commit", environment.get("commit") or (held["manifest"].get("code") or {}).get("commit")),
        ("chip", (environment.get("device") or {}).get("chip")),
        ("ranks", environment.get("ranks")),
        ("threads per rank", environment.get("threads_per_rank")),
        ("precision", (config.get("train") or {}).get("precision")),
        ("seed", (config.get("train") or {}).get("seed")),
        ("torch", (environment.get("packages") or {}).get("torch")),
    ):
        if value is not None:
            facts[name] = value
    return facts


def _foreign(path: Path, kind: str, table: dict[str, dict[int, float]], columns: Mapping[str, str]) -> Curve:
    """Give the columns of another framework our names."""
    absent = [f"{ours}={theirs}" for ours, theirs in columns.items() if theirs not in table and ours != "step"]
    if absent:
        raise DataError(f"{path} has no column for --column {absent[0]}; it has {_listed(table)}")
    by_plain = {_plain(name): name for name in reversed(list(table))}
    series: dict[str, Series] = {}
    for ours, usual in _KNOWN.items():
        theirs = columns.get(ours) or next((by_plain[name] for name in usual if name in by_plain), None)
        if theirs is not None and table[theirs] and ours != "step":
            series[ours] = Series.of(table[theirs])
    for ours in columns.keys() - _KNOWN.keys():
        series[ours] = Series.of(table[columns[ours]])
    if LOSS not in series:
        raise DataError(
            f"no column of {path} is known as the training loss; it has {_listed(table)}; name it with "
            f"--column {LOSS}=NAME"
        )
    losses = tuple(name for name in (LOSS, "mtp") if name in series)
    return Curve(path.stem if kind == "csv" else path.name, path, kind, series, losses)


def _csv(path: Path) -> dict[str, dict[int, float]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or ())
            key = next((name for name in header if _plain(name) in _KNOWN["step"]), None)
            if key is None:
                raise DataError(f"{path} has no column of steps (step, iteration, ...); it has {_listed(header)}")
            table: dict[str, dict[int, float]] = {name: {} for name in header if name != key}
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise DataError(f"{where}: more cells than the header has columns ({len(header)})")
                step = _cell(row[key], where, key)
                if step is None or step != int(step):
                    raise DataError(f"{where}: {key} is {row[key]!r}, expected a whole number")
                for name, points in table.items():
                    value = _cell(row[name], where, name)
                    if value is not None:
                        points[int(step)] = value
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}") from None
    return table


def _cell(text: str | None, where: str, name: str) -> float | None:
    """A number, or None for an empty cell; words such as a run's name make the whole column none of ours."""
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        if _plain(name) in {usual for names in _KNOWN.values() for usual in names}:
            raise DataError(f"{where}: {name} is {text!r}, expected a number") from None
        return None


def _events(path: Path) -> bool:
    if path.is_file():
        return "tfevents" in path.name
    return path.is_dir() and any(path.rglob("*tfevents*"))


def _tensorboard(path: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag, of all event files under a folder: a restarted run writes several."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415
    except ImportError:
        raise DataError(
            f"reading {path} takes the package tensorboard; install it with `pip install fullweight[trackers]`"
        ) from None
    files = [path] if path.is_file() else sorted(path.rglob("*tfevents*"))
    table: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                table.setdefault(tag, {})[event.step] = event.value
                table.setdefault(WALL, {})[event.step] = event.wall_time
    if table:
        began = min(table[WALL].values())
        table[WALL] = {step: time - began for step, time in table[WALL].items()}
    return table


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(names) or "none"
