"""Deterministic mode is on inside, and leaves torch as it was."""

import pytest
import torch

from fullweight.devices import find
from fullweight.parallel.deterministic import deterministic


@pytest.mark.parametrize("on", [True, False])
def test_the_mode_ends_with_the_block(on: bool) -> None:
    """Also when the block fails."""
    filled = torch.utils.deterministic.fill_uninitialized_memory

    def fail() -> None:
        with deterministic(on, find("cpu")):
            assert torch.are_deterministic_algorithms_enabled() is on
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
