"""The table of chips is whole, and a name that is not in it is told with the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.planner.chips import chip, chip_names


@pytest.mark.parametrize("name", chip_names())
def test_every_chip_resolves(name: str) -> None:
    """All fields are there and leave memory for tensors, also with many process groups."""
    found = chip(name)
    assert found.name == name
    assert 0 < found.usable_bytes(10) < found.usable_bytes(0) < found.memory_gb * 2**30


def test_a_die_of_the_910c() -> None:
    """A chip is two dies; 64e9 bytes of each are 59.6 GiB."""
    die = chip("ascend-910c")
    assert (die.device, die.dies_per_chip) == ("die", 2)
    assert die.memory_gb == pytest.approx(64e9 / 2**30, rel=1e-3)


def test_an_unknown_chip_is_told() -> None:
    nearest = r"did you mean 'ascend-910c' or 'ascend-910b4' or 'ascend-910b3'\?"
    with pytest.raises(ConfigError, match=rf"unknown chip 'ascend-910'; {nearest}"):
        chip("ascend-910")


@pytest.mark.parametrize("name", chip_names())
def test_every_figure_has_status_and_source(name: str) -> None:
    found = chip(name)
    figures = {"memory_gb", "memory_bandwidth", "reserved_gb", "buffer_gb_per_group", "power_w", "system_w"}
    figures |= {f"peaks.{kind}" for kind in found.peaks}
    figures |= {f"links.{i}.{key}" for i in range(len(found.links)) for key in ("bandwidth", "latency_us")}
    assert set(found.provenance) == figures
    assert all(
        p.status in {"measured", "stated", "derived"} and len(p.source) > 5 for p in found.provenance.values()
    )
    assert found.links[-1].ranks == 0


def test_links_by_distance() -> None:
    die = chip("ascend-910c")
    assert [die.link(span).name for span in (2, 16, 17, 768, 769)] == [
        "twin die",
        "node",
        "supernode",
        "supernode",
        "scale-out",
    ]
    assert chip("nvidia-h100") == chip("h100")


def test_a_file_of_ones_own_adds_a_cluster(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[our-hall]\nbase = "ascend-910c"\n'
        'links = [{ name = "hall", ranks = 0, bandwidth = [24.5, "measured", "our own"], latency_us = 9.0 }]\n'
    )
    ours = chip("our-hall", file)
    assert ours.link(2).name == "hall"
    assert ours.provenance["links.0.bandwidth"].status == "measured"
    assert ours.memory_gb == chip("ascend-910c").memory_gb
    file.write_text('[our-hall]\nbase = "ascend-910c"\nmemory_gb = [64, "guessed", "a friend"]\n')
    with pytest.raises(ConfigError, match="has status 'guessed'; expected"):
        chip("our-hall", file)
