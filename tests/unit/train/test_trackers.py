"""Optional trackers get the ledger's numbers; a missing library is told before any work."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.errors import ConfigError
from fullweight.evidence.ledger import Ledger
from fullweight.train import trackers as module
from fullweight.train.records import Records
from fullweight.train.trackers import TrackerConfig, Trackers, check_trackers, flatten


def test_only_numbers_are_flattened() -> None:
    """Texts, lists, flags and nothing stay in the ledger alone."""
    line = {"loss": {"lm": 1, "x": {"y": 2.5}}, "routing": "natural", "names": ["a"], "skipped": None, "ok": True}
    assert flatten(line) == {"loss/lm": 1.0, "loss/x/y": 2.5}


def test_a_missing_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a tracker that is not installed says how to get it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install fullweight\[trackers\]"):
        check_trackers(TrackerConfig(names=("wandb",)))


def test_tensorboard_receives_the_scalars(tmp_path: Path) -> None:
    """What was logged can be read back by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    trackers = Trackers(TrackerConfig(names=("tensorboard",)), tmp_path, {}, said.append)
    trackers.log(3, {"loss/lm": 1.25})
    trackers.close()
    assert not said
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/lm")] == [(3, 1.25)]


@pytest.mark.parametrize("fails_in", ["start", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_left_out(
    fails_in: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whenever it fails, the run goes on, the other tracker gets every number, and one line says why."""

    class ForeignError(Exception):
        pass

    calls: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name
            self.meet("start")

        def meet(self, what: str) -> None:
            if self.name == "wandb" and what == fails_in:
                raise ForeignError("server says 503\nand more")

        def log(self, step: int, values: dict[str, float]) -> None:
            calls.append((self.name, step))
            self.meet("log")

        def close(self) -> None:
            self.meet("close")

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(module._TRACKERS, name, lambda *_a, name=name: Fake(name))
    said: list[str] = []
    config = TrackerConfig(names=("wandb", "mlflow"))
    reporter: Any = None
    ledger = Ledger(tmp_path / "ledger.jsonl")
    records = Records(ledger, Trackers(config, tmp_path, {}, said.append), reporter)
    for step in (1, 2, 3):
        records.write("step", step, {"loss": 1.0})
    records.close()
    assert [step for name, step in calls if name == "mlflow"] == [1, 2, 3]
    expected = {"start": [], "log": [1], "close": [1, 2, 3]}[fails_in]
    assert [step for name, step in calls if name == "wandb"] == expected
    [line] = said
    assert "wandb failed" in line
    assert "ForeignError: server says 503)" in line
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3
