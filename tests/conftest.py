"""Tests that need what not every machine has run only where it is: data beside the repository, a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


_ABSENT = {
    marker: what
    for marker, there, what in (
        ("shared_data", SHARED_DATA.is_dir(), f"{SHARED_DATA}: tests of real data"),
        ("browser", shutil.which("chromium") is not None, "chromium: tests of pages in a browser"),
    )
    if not there
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests whose marker stands for what is absent."""
    absent = [item for item in items if any(item.get_closest_marker(marker) for marker in _ABSENT)]
    items[:] = [item for item in items if item not in absent]
    config.hook.pytest_deselected(items=absent)


def pytest_report_header() -> list[str]:
    """Say what is left out, and why."""
    return [f"no {what} (marker {marker}) are left out" for marker, what in _ABSENT.items()]
