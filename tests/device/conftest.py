"""The same tests for every device: those of the machine's accelerator, if it has one, and those of its CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fullweight.devices import Device, find

PRESENT = list(dict.fromkeys([find("auto").name, "cpu"]))


@pytest.fixture(params=PRESENT)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device that is there, current for this process, its generator left as it was found."""
    found = find(request.param)
    found.device(0)
    state = found.rng_state()
    yield found
    found.set_rng_state(state)
