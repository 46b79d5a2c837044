"""A run that is begun again goes on under its first manifest only with the same data."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.evidence.test_manifest import values

from fullweight.core.errors import DataError
from fullweight.evidence.manifest import Data, RunManifest
from fullweight.train.opening import require_same_data

BEFORE = RunManifest.resolve(values(), "test")


def data(**changes: Any) -> Data:
    return Data.resolve({**BEFORE.data.model_dump(mode="json"), **changes}, "test")


def test_other_data_are_refused_by_name() -> None:
    """A file that changed is named; samples that are no file's are told as such."""
    file = {"name": "data/mine.jsonl", "size_bytes": 1, "sha256": "0" * 64}
    with pytest.raises(DataError, match=r"not those that this run began with \(data/mine\.jsonl\)"):
        require_same_data(BEFORE, data(files=[file]))
    with pytest.raises(DataError, match="generated or fetched samples"):
        require_same_data(BEFORE, data(train={"number": 1, "merkle_root": "1" * 64}))


def test_the_same_samples_from_another_cache_go_on() -> None:
    require_same_data(BEFORE, data(sources=[{"name": "somebody/set", "identity": {"fingerprint": "b"}}]))
