"""Tests that read data which is not part of the repository run only where it lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave `shared_data` tests out when there is no such folder."""
    if SHARED_DATA.is_dir():
        return
    absent = [item for item in items if item.get_closest_marker("shared_data")]
    items[:] = [item for item in items if item not in absent]
    config.hook.pytest_deselected(items=absent)


def pytest_report_header() -> str | None:
    """Say what is left out, and why."""
    if SHARED_DATA.is_dir():
        return None
    return f"no {SHARED_DATA}: tests of real data (marker shared_data) are left out"
