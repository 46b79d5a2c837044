"""Saving beside training: nothing later leaks in, nothing overlaps, no failure is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.saved import facts, loaded, state

from fullweight.checkpoint import async_save, snapshot, store
from fullweight.checkpoint.async_save import Failure, SaveConfig, Saver
from fullweight.checkpoint.generations import listed
from fullweight.checkpoint.store import Saved
from fullweight.core.errors import CheckpointError


def saver(folder: Path, **settings: Any) -> Saver:
    return Saver(folder, SaveConfig.resolve({"retry_seconds": 0.0, **settings}))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    event, write = threading.Event(), store.save

    def wait_then_save(*args: Any, **kwargs: Any) -> Saved:
        assert event.wait(20)
        return write(*args, **kwargs)

    monkeypatch.setattr(store, "save", wait_then_save)
    return event


def test_what_training_changes_afterwards_is_not_saved(tmp_path: Path, gate: threading.Event) -> None:
    """The state is that of the moment of `save`, although every tensor has changed before a byte was written."""
    values, writer = state(1.0), saver(tmp_path)
    expected = {name: tensor.clone() for name, tensor in values.items()}
    stall = writer.save(values, facts(1))
    for tensor in values.values():
        tensor.add_(1)
    assert writer.reports() == []
    gate.set()
    writer.wait()
    [report] = writer.reports()
    assert isinstance(report, Saved)
    assert stall.synchronous is None
    assert all(torch.equal(loaded(report.path)[name], expected[name]) for name in expected)


def test_overlapping_saves_wait_for_each_other(tmp_path: Path, gate: threading.Event) -> None:
    """The second begins when the first is on disk; the wait is counted as stall; both are right."""
    values, writer = state(1.0), saver(tmp_path)
    writer.save(values, facts(1))
    threading.Timer(0.3, gate.set).start()
    values["model.w"].fill_(2.0)
    stall = writer.save(values, facts(2))
    writer.wait()
    assert 0.2 < stall.waited_seconds <= stall.seconds
    assert [type(r) for r in writer.reports()] == [Saved, Saved]
    assert [loaded(path)["model.w"][0, 0].item() for _, path in listed(tmp_path)] == [1.0, 2.0]


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The disk refuses so many attempts."""
    write, left = store.save, [times]

    def refuse_then_save(*args: Any, **kwargs: Any) -> Saved:
        if left[0]:
            left[0] -= 1
            raise CheckpointError("no room")
        return write(*args, **kwargs)

    monkeypatch.setattr(store, "save", refuse_then_save)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_attempt_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The same state, not a later one; in the background and not."""
    failing(monkeypatch, 2)
    values, writer = state(1.0), saver(tmp_path, asynchronous=asynchronous)
    writer.save(values, facts(1))
    values["model.w"].zero_()
    writer.wait()
    *failures, saved = writer.reports()
    assert failures == [Failure(1, 1, "no room"), Failure(1, 2, "no room")]
    assert isinstance(saved, Saved)
    assert loaded(saved.path)["model.w"][0, 0] == 1.0
    assert writer.gave_up is None


def test_too_many_failures_in_a_row_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved before stays as it is, and nothing is begun afterwards."""
    values, writer = state(1.0), saver(tmp_path, max_failures=2)
    writer.save(values, facts(1))
    writer.wait()
    failing(monkeypatch, 10)
    writer.save(values, facts(2))
    writer.wait()
    assert writer.gave_up == Failure(2, 2, "no room")
    writer.save(values, facts(3))
    writer.wait()
    assert [r.step for r in writer.reports() if isinstance(r, Failure)] == [2, 2]
    assert [path.name for _, path in listed(tmp_path)] == ["step-1"]
    loaded(tmp_path / "step-1")


def test_the_pause_doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a minute should not end a run."""
    failing(monkeypatch, 3)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    writer = saver(tmp_path, max_failures=4, retry_seconds=5.0, asynchronous=False)
    writer.save(state(), facts(1))
    assert pauses == [5.0, 10.0, 20.0]


@pytest.mark.parametrize("ask", [Saver.wait, Saver.reports])
def test_a_bug_in_the_background_is_raised_in_the_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Saver], Any]
) -> None:
    """With its own type: it is not retried and not a message."""

    def fail(*args: Any, **kwargs: Any) -> Saved:
        raise KeyError("a bug")

    monkeypatch.setattr(store, "save", fail)
    writer = saver(tmp_path)
    writer.save(state(), facts(1))
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(KeyError, match="a bug"):
        ask(writer)


def test_without_memory_for_a_copy_the_save_is_synchronous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is killed at its first save loses more than a pause; the reason is told."""
    monkeypatch.setattr(snapshot, "available_memory_bytes", lambda: 100)
    writer = saver(tmp_path)
    stall = writer.save(state(), facts(1))
    assert stall.synchronous is not None
    assert "host memory" in stall.synchronous
    assert [type(r) for r in writer.reports()] == [Saved]


def test_later_snapshots_reuse_the_memory_of_the_first(tmp_path: Path) -> None:
    """Only new or reshaped tensors need room."""
    copies = snapshot.Snapshot()
    values = state()
    first = copies.take(values)
    again = copies.take(values)
    assert {n: t.data_ptr() for n, t in first.items()} == {n: t.data_ptr() for n, t in again.items()}
    values["model.noise"] = torch.zeros(3)
    assert copies.take(values)["model.noise"].shape == (3,)


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit below the machine's memory is the limit."""
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000\n")
    used.write_text("2000\n")
    monkeypatch.setattr(snapshot, "_CGROUPS", ((str(limit), str(used)),))
    assert snapshot.available_memory_bytes() == 3000
    limit.write_text("max\n")
    assert snapshot.available_memory_bytes() > 3000


def test_the_defaults_are_safe() -> None:
    """At least two generations, in the background, more than one attempt."""
    config = async_save.SaveConfig()
    assert (config.keep, config.asynchronous, config.max_failures) == (2, True, 3)
