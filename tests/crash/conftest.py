"""Runs that nothing interrupted, one for each number of ranks, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.runs import train

Whole = Callable[[int], Path]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of the uninterrupted run on so many ranks."""
    made: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp("whole") / str(ranks)
            ended = train(folder, ranks)
            assert ended.ok, ended.output
            made[ranks] = folder
        return made[ranks]

    return make
