"""The benchmark of recording takes real steps and its figures follow from each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullweight.bench.evidence_bench import measure_evidence
from fullweight.core.config import apply_overrides, read_toml
from fullweight.evidence.ledger import mend, read
from fullweight.train.config import RunConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_smoke.toml"


def test_it_records_every_second_step(tmp_path: Path) -> None:
    values = apply_overrides(read_toml(RECIPE), ["eval.num_samples=0", "train.peak_flops_per_second=1e12"])
    found = measure_evidence(RunConfig.resolve(values, "test"), tmp_path, steps=2)
    lines = list(read(tmp_path / "ledger.jsonl"))
    mend(tmp_path / "ledger.jsonl")
    assert [line["step"] for line in lines] == [3, 5]
    assert all(line["batch"]["rows"] == 2 for line in lines)
    assert found.share == pytest.approx(found.recording_seconds / (found.step_seconds + found.recording_seconds))
    assert 0 < found.digest_seconds < found.recording_seconds
    assert found.line_bytes == (tmp_path / "ledger.jsonl").stat().st_size // 2
