"""Optional trackers get the ledger's numbers; a missing library is told before any work."""

import importlib.util
from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.train.trackers import TrackerConfig, check_trackers, flatten, open_trackers


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

    [tracker] = open_trackers(TrackerConfig(names=("tensorboard",)), tmp_path, {})
    tracker.log(3, {"loss/lm": 1.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/lm")] == [(3, 1.25)]
