"""Optional trackers beside the ledger: TensorBoard, Weights & Biases, MLflow.

Each takes the same flat numbers; the ledger stays the record. The library is looked for before any work
starts, so that a missing one is a message and not a failed run. One that fails later (a network, a full disk,
a server that answers nonsense) is told once and left out from then on: it is not worth a run.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_LIBRARY = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class TrackerConfig(Config):
    """Which trackers to feed, and the project and run they file the numbers under."""

    names: tuple[TrackerName, ...] = ()
    project: str = "fullweight"


class Tracker(Protocol):
    """Receives flat numbers by step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_dict(config, "config.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def check_trackers(config: TrackerConfig) -> None:
    """Raise ConfigError when a tracker's library is not installed."""
    for name in config.names:
        if importlib.util.find_spec(_LIBRARY[name]) is None:
            raise ConfigError(
                f"trackers.names asks for {name!r} but its library is not installed; "
                "`pip install fullweight[trackers]` or leave it out"
            )


class Trackers:
    """The chosen trackers of a run. `say` is told, once for each, of one that failed and is left out."""

    def __init__(
        self, config: TrackerConfig, folder: Path, run_config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._running: dict[str, Tracker] = {}
        for name in config.names:
            self._guarded(name, lambda n: self._start(n, folder, config.project, run_config))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand numbers to every tracker that still works."""
        for name in list(self._running):
            self._guarded(name, lambda n: self._running[n].log(step, values))

    def close(self) -> None:
        """Let every tracker that still works finish."""
        for name in list(self._running):
            self._guarded(name, lambda n: self._running[n].close())
        self._running.clear()

    def _start(self, name: str, folder: Path, project: str, run_config: dict[str, Any]) -> None:
        self._running[name] = _TRACKERS[name](folder, project, run_config)

    def _guarded(self, name: str, work: Callable[[str], None]) -> None:
        try:
            work(name)
        except Exception as error:  # whatever a foreign library raises; its own classes share no root
            self._running.pop(name, None)
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            self._say(
                f"warning: the tracker {name} failed and gets no more numbers ({type(error).__name__}: {reason}); "
                "training goes on and the ledger has them all"
            )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a ledger line under slash-separated names; texts and lists are left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat
