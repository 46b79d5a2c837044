"""`fullweight bench convert`: its arithmetic on small matrices, its record, its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullweight.bench import convert_bench
from fullweight.bench.convert_bench import measure_convert
from fullweight.cli.main import main


def test_rates_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gives every operation 1 s, the copy 0.5 s: bytes of output over time, shares of the copy."""
    ticks = iter(t for _ in range(100) for t in (0.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0))
    monkeypatch.setattr(convert_bench.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(convert_bench, "Waiting", type("W", (), {"share": lambda self: None}))
    found = measure_convert(rows=130, columns=96, repeats=3)
    rates = {(r.operation, r.dtype): r for r in found.rates}
    assert len(rates) == 8
    assert rates["copy", "bfloat16"].bytes_per_second == 130 * 96 * 2 / 0.5
    assert rates["fp4", "bfloat16"].bytes_per_second == 130 * 96 * 2
    assert rates["fp8", "float32"].bytes_per_second == 130 * 96 * 4
    assert rates["fp4", "float32"].share_of_copy == 0.5
    assert rates["copy", "float32"].share_of_copy == 1


@pytest.mark.parametrize("slowest", [0.3, 0.2])
def test_the_command_tells_and_records(
    slowest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, JSON record with the commit, and exit status 1 where a quarter of a copy is not reached."""
    measured = measure_convert(rows=128, columns=64, repeats=1)
    rates = [convert_bench.Rate("fp4", "bfloat16", 3e9, 0.1, slowest)]
    made = convert_bench.ConvertBench("torch", 1, 128, 64, rates, 0.3)
    monkeypatch.setattr(convert_bench, "measure_convert", lambda **_: made)
    status = main(["bench", "convert", "--json", str(tmp_path / "r.json")])
    assert status == (0 if slowest >= 0.25 else 1)
    printed = capsys.readouterr().out
    assert "3.00" in printed
    assert "disturbed" in printed
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["rates"][0]["share_of_copy"] == slowest
    assert record["commit"]
    assert measured.rates
