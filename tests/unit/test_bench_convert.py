"""`fullweight bench convert`: its arithmetic on small matrices, its record, its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullweight.bench import convert_bench
from fullweight.bench.convert_bench import measure_convert
from fullweight.checkpoint import native
from fullweight.cli.main import main


def test_rates_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gives every operation 1 s, the copy 0.5 s: bytes of values over time, shares of the copy."""
    codecs = convert_bench.codecs()
    assert "torch" in codecs
    ticks = iter(t for _ in range(8) for t in (0.0, 0.5, *(0.0, 1.0) * 6 * len(codecs)))
    monkeypatch.setattr(convert_bench.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(convert_bench, "Waiting", type("W", (), {"share": lambda self: None}))
    found = measure_convert(rows=130, columns=96, repeats=3)
    rates = {(r.operation, r.format, r.codec, r.dtype): r for r in found.rates}
    assert len(rates) == 2 + 12 * len(codecs)
    assert rates["copy", "", "", "bfloat16"].bytes_per_second == 130 * 96 * 2 / 0.5
    assert rates["copy", "", "", "float32"].share_of_copy == 1
    for codec in codecs:
        assert rates["decode", "fp4", codec, "bfloat16"].bytes_per_second == 130 * 96 * 2
        assert rates["encode", "fp8", codec, "float32"].bytes_per_second == 130 * 96 * 4
        assert rates["encode", "fp4", codec, "float32"].share_of_copy == 0.5
    assert found.worst_decoder().operation == "decode"


def test_every_operation_runs_by_the_codec_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are called while a compiled codec is timed and never for torch's; the choice is undone after."""
    seen: dict[str, int] = {}
    original = native._call

    def counted(*arguments: object) -> None:
        seen[native.decoder_name()] = seen.get(native.decoder_name(), 0) + 1
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "_call", counted)
    before = native.decoder_name()
    measure_convert(rows=130, columns=96, repeats=1)
    assert seen == ({"compiled": 2 * 2 * 6} if "compiled" in convert_bench.codecs() else {})
    assert native.decoder_name() == before


@pytest.mark.parametrize("slowest", [0.3, 0.2])
def test_the_command_tells_and_records(
    slowest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, JSON record with the commit, and exit status 1 where a quarter of a copy is not reached."""
    measured = measure_convert(rows=128, columns=64, repeats=1)
    rates = [convert_bench.Rate("decode", "fp4", "torch", "bfloat16", 3e9, 0.1, slowest)]
    rates.append(convert_bench.Rate("encode", "fp4", "torch", "bfloat16", 1e8, 0.1, 0.01))
    made = convert_bench.ConvertBench(1, 128, 64, rates, 0.3)
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
