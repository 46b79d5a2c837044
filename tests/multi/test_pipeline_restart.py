"""A pipeline that was killed and resumed comes to the bits of one that was not, and so does a second start.

Compared are every step's numbers and the files of the last checkpoint: weights, moments, counters, generators.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash.runs import assert_same_in_the_end, lines, resume, train

ROWS = "train.rows_per_step=4"
V = ("parallel.schedule='zbv'", "parallel.virtual_stages=2")
ROUNDS = ("parallel.schedule='interleaved'", "parallel.virtual_stages=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1f1b": (2, (ROWS, "parallel.pipeline=2")),
    "zbv, deterministic": (2, (ROWS, "parallel.pipeline=2", *V, "parallel.deterministic=true")),
    "1f1b of shards": (4, (ROWS, "parallel.pipeline=2")),
    "interleaved, experts dealt": (4, (ROWS, "parallel.pipeline=2", *ROUNDS, "parallel.expert=2")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_killed_pipeline_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """kill -9 of a rank of the last stage before step 6: on from step 4, or 2 while that was being written."""
    ranks, settings = LAYOUTS[name]
    whole, again = tmp_path / "whole", tmp_path / "again"
    ended = train(whole, ranks, settings=settings)
    assert ended.ok, ended.output
    ended = train(again, ranks, f"train.step rank={ranks - 1} nth=6", settings)
    assert not ended.ok
    ended = resume(again, ranks)
    assert ended.ok, ended.output
    [resumed] = [line for line in lines(again, "event") if line["what"] == "resume"]
    assert resumed["step"] in (2, 4)
    assert_same_in_the_end(again, whole)


@pytest.mark.slow
def test_a_second_start_gives_the_same_bits(tmp_path: Path) -> None:
    """Deterministic mode, experts and stages on four ranks: the same layout, the same files."""
    settings = (ROWS, "parallel.pipeline=2", "parallel.expert=2", "parallel.deterministic=true")
    for name in ("one", "two"):
        ended = train(tmp_path / name, 4, settings=settings)
        assert ended.ok, ended.output
    assert_same_in_the_end(tmp_path / "two", tmp_path / "one")
