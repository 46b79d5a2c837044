"""The checkpoint benchmark runs and its figures are those of the operations that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullweight.bench.checkpoint_bench import measure_checkpoint


def test_it_measures_every_part_and_leaves_nothing(tmp_path: Path) -> None:
    """A small state, once; rates are size over time, and the folder is empty afterwards."""
    found = measure_checkpoint(tmp_path, megabytes=8, repeats=1)
    assert found.size_bytes == 8_000_000
    assert len(found.timings) == 8
    for timing in found.timings:
        assert timing.seconds * timing.bytes_per_second == pytest.approx(found.size_bytes)
    assert 0 < found.stall_seconds < found.seconds_meanwhile
    assert list(tmp_path.iterdir()) == []
