"""Every contract test runs on each set of operations that this machine has."""

from __future__ import annotations

import pytest

from fullweight.ops import available_operations, resolve_operations
from fullweight.ops.reference import ReferenceOperations


@pytest.fixture(params=available_operations())
def ops(request: pytest.FixtureRequest) -> ReferenceOperations:
    return resolve_operations(request.param)
