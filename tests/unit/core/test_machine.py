"""What the machine has left: the lower of its own and its container's, and one message where it is too little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fullweight.core import machine
from fullweight.core.errors import ConfigError
from fullweight.core.machine import available_memory_bytes, require_disk, require_memory


def test_a_containers_limit_counts_where_it_is_lower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Limit minus use, cached files given back; "max" and a machine without such files have no limit."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert available_memory_bytes() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert available_memory_bytes() == 1000
    (tmp_path / "memory.max").write_text("500\n")
    assert available_memory_bytes() == 100
    (tmp_path / "memory.stat").write_text("anon 350\ninactive_file 30\nactive_file 20\n")
    assert available_memory_bytes() == 130
    (tmp_path / "memory.max").write_text("300\n")
    assert available_memory_bytes() == 0


def test_too_little_memory_says_needed_found_and_what_to_do() -> None:
    """In one unit, so that the two can be compared at a glance; what fits passes."""
    require_memory(10, "a thing", "buy more", available_bytes=10)
    said = r"a thing needs 2.5 GB of memory, and 0.1 GB are available here; buy more"
    with pytest.raises(ConfigError, match=said):
        require_memory(2_500_000_000, "a thing", "buy more", available_bytes=100_000_000)
    with pytest.raises(ConfigError, match=r"needs .* of memory"):
        require_memory(2**60, "a thing", "buy more")


def test_too_little_disk_is_told_for_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    """The nearest folder that exists stands for the disk."""
    require_disk(tmp_path / "a" / "b", 1, "a thing", "free some")
    with pytest.raises(ConfigError, match=f"a thing needs up to .* GB, and {tmp_path} has .* GB free; free some"):
        require_disk(tmp_path / "a" / "b", 2**60, "a thing", "free some")
