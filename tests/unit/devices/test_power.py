"""Power over a step: exact where energy is counted, else an average of readings, or unknown."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fullweight.devices.cpu import energy_joules
from fullweight.devices.power import EnergyCounters, Readings


def test_energy_over_time_of_a_tree_of_counters(tmp_path: Path) -> None:
    """Two packages, one of which begins anew; what was used before the step is not in it."""

    def write(*microjoules: int) -> None:
        for number, counted in enumerate(microjoules):
            zone = tmp_path / f"intel-rapl:{number}"
            zone.mkdir(exist_ok=True)
            (zone / "energy_uj").write_text(f"{counted}\n")
            (zone / "max_energy_range_uj").write_text("10000000\n")

    write(0, 0)
    clock = iter([0.0, 10.0, 12.0, 20.0, 24.0])
    meter = EnergyCounters(lambda: energy_joules(tmp_path), lambda: next(clock))
    write(1_000_000, 9_000_000)
    meter.begin()
    write(3_000_000, 2_000_000)
    assert meter.watts() == pytest.approx((2.0 + 3.0) / 2.0)
    meter.begin()
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.watts() is None, "half of the machine is not a guess at all of it"


def test_a_machine_without_counters_is_unknown(tmp_path: Path) -> None:
    meter = EnergyCounters(lambda: energy_joules(tmp_path))
    meter.begin()
    assert meter.watts() is None


def test_readings_inside_the_stretch_are_averaged() -> None:
    """The tool is asked in a thread; a stretch between two readings has the last one."""
    values, asked = iter([100.0, 300.0, None]), threading.Semaphore(0)
    entered, done = [], threading.Event()

    def read() -> float | None:
        asked.acquire()
        found = next(values)
        if found is None:
            done.set()
        return found

    meter = Readings(read, every=0.0, enter=lambda: entered.append(threading.current_thread().name))
    meter.begin()
    assert meter.watts() is None
    asked.release(3)
    assert done.wait(60)
    assert meter.watts() == 200.0
    meter.close()
    assert entered == ["fullweight-power"]


def test_a_tool_that_says_nothing_is_asked_once() -> None:
    asked, thread = [], threading.enumerate
    meter = Readings(lambda: asked.append(1), every=0.0)
    for _ in range(2):
        meter.begin()
        for waiting in thread():
            if waiting.name == "fullweight-power":
                waiting.join(60)
        assert meter.watts() is None
    assert asked == [1]
