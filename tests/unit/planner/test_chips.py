"""The table of chips is whole, and a name that is not in it is told with the nearest."""

from __future__ import annotations

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
    with pytest.raises(ConfigError, match=r"unknown chip 'ascend-910'; did you mean 'ascend-910c'\?"):
        chip("ascend-910")
