"""What a run achieved, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from fullweight.evidence.lines import History, read_history
from fullweight.evidence.performance import performance


def _step(step: int, time: float, seconds: float, watts: float | None = 100.0, skipped: str | None = None) -> Any:
    return {
        "kind": "step",
        "step": step,
        "time": time,
        "previous": "0" * 64,
        "loss": {"lm": 1.0},
        "loss_hex": {},
        "total_loss": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 1.0,
        "tokens_per_second": 0.0,
        "mfu": 0.0,
        "tokens": {"real": 100 * step, "padding": 10, "trained": 50.0, "so_far": 0},
        "model_flops_per_second": 0.0,
        "mfu_convention": "another",
        "routing": "natural",
        "operations": "cpu",
        "peak": {"flops_per_second": 1e9, "source": "given"},
        "experts": {"max_over_mean": 1.5, "dropped": 0},
        "parameters": {"total": 1, "trained": 1},
        "seconds": {"data": seconds / 4, "forward": seconds * 3 / 4, "total": seconds},
        "skipped": skipped,
        "power": {"watts": watts, "source": "counter"},
        "batch": {
            "digest": "",
            "samples": 1,
            "pairs": {"window": 0, "csa_selected": 0, "csa_visible": 0, "hca": 0},
        },
    }


def _event(what: str, step: int, time: float) -> Any:
    return {"kind": "event", "what": what, "step": step, "time": time, "previous": "0" * 64}


def _eval(step: int, time: float, loss: float) -> Any:
    values = {"loss": {"lm": loss}, "total_loss": loss, "score": None, "num_scored": 0}
    return {"kind": "eval", "step": step, "time": time, "previous": "0" * 64, **values}


def _history(*lines: Any) -> History:
    return read_history(io.BytesIO("".join(json.dumps(line) + "\n" for line in lines).encode()))


def test_an_interrupted_run_by_hand() -> None:
    """Step 2 is lost and made again; a skipped step is in the step times and is not productive."""
    history = _history(
        _event("start", 0, 0.0),
        _eval(0, 1.0, 5.0),
        _step(1, 11.0, 8.0),
        _step(2, 16.0, 4.0),
        _event("resume", 1, 30.0),
        _step(2, 40.0, 6.0),
        _step(3, 50.0, 2.0, skipped="a spike"),
        _eval(3, 52.0, 4.0),
        _event("finish", 3, 60.0),
    )
    assert [p.number for p in history.all if p.superseded] == [4]
    found = performance(history, None)
    assert found["goodput"] == {
        "productive_seconds": 14.0,
        "wall_seconds": 60.0,
        "superseded_seconds": 4.0,
        "superseded_steps": 1,
        "interruptions": 1,
        "share": pytest.approx(14 / 60),
        "reason": None,
    }
    assert (found["steps"], found["skipped"], found["tokens"]["real"]) == (3, 1, 600)
    times = found["step_seconds"]
    assert (times["first"], times["median"], times["smallest"], times["largest"]) == (8.0, 6.0, 2.0, 8.0)
    assert times["p5"] == pytest.approx(2.4)
    assert times["p95"] == pytest.approx(7.8)
    assert found["tokens_per_second"]["overall"] == pytest.approx(600 / 16)
    assert found["data_wait"] == {"seconds": 4.0, "share": pytest.approx(0.25)}
    assert found["energy"]["joules"] == pytest.approx(2000.0), "the lost step drew power too"
    assert found["energy"]["joules_per_token"] == pytest.approx(2000 / 600)
    reached = [(r["loss"], r["step"], r["wall_seconds"], r["step_seconds"]) for r in found["time_to_loss"]]
    assert reached == [(5.0, 0, 1.0, 0), (4.0, 3, 52.0, 16.0)]
    assert found["mfu"]["overall"] is None
    assert "cannot be recomputed" in found["mfu"]["reason"]


def test_wall_time_is_unknown_where_the_clock_was_set_back_between_segments() -> None:
    """What needs no time between segments stays; goodput, and times to a loss behind it, are not known."""
    history = _history(
        _event("start", 0, 100.0),
        _eval(0, 101.0, 5.0),
        _step(1, 111.0, 8.0),
        _event("resume", 1, 50.0),
        _step(2, 60.0, 6.0),
        _eval(2, 61.0, 4.0),
    )
    found = performance(history, None)
    assert (found["goodput"]["wall_seconds"], found["goodput"]["share"]) == (None, None)
    assert "line 4 (step 1) begins a segment 61.000 s before" in found["goodput"]["reason"]
    assert found["goodput"]["productive_seconds"] == 14.0
    assert [(r["wall_seconds"], r["step_seconds"]) for r in found["time_to_loss"]] == [(1.0, 0), (None, 14.0)]


def test_energy_is_unknown_as_soon_as_one_step_does_not_know() -> None:
    history = _history(_event("start", 0, 0.0), _step(1, 9.0, 1.0), _step(2, 10.0, 1.0, watts=None))
    found = performance(history, None)["energy"]
    assert found == {"joules": None, "joules_per_token": None, "reason": "power is unknown in 1 of 2 steps"}


def test_a_start_over_supersedes_all_before_it() -> None:
    history = _history(_event("start", 0, 0.0), _step(1, 9.0, 1.0), _event("start", 0, 10.0), _step(1, 12.0, 1.0))
    assert [p.number for p in history.live] == [3, 4]
    assert performance(history, None)["goodput"]["interruptions"] == 1
