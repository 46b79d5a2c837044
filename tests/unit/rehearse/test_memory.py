"""Blocks by hand: what they were for, and what was held when."""

from __future__ import annotations

import pytest

from fullweight.rehearse.memory import Block, Category, timeline


def test_categories_and_peak_of_a_step_by_hand() -> None:
    """Weights stay; an activation lives into backward; what dies before it, or is born in it, is temporary."""
    blocks = [
        Block(100, 0, "", False, Category.parameters),
        Block(10, 1, "a", False, death=2),  # temporary: gone before backward began at 4
        Block(20, 2, "a", False, death=6),  # activation
        Block(7, 3, "b", False, in_collective=True, death=4),  # a buffer of a collective
        Block(40, 5, "b", True, Category.gradients),
        Block(30, 5, "b", True, death=6),  # temporary of backward
    ]
    found = timeline(blocks, [4], last=8)
    held = {int(m): found.at(i) for i, m in enumerate(found.moments)}
    assert held[1]["temporaries"] == 10
    assert held[2] == {**dict.fromkeys(held[2], 0), "parameters": 100, "activations": 20}
    assert held[3]["communication"] == 7
    assert found.total.tolist() == [100, 110, 120, 127, 120, 190, 140]
    assert int(found.moments[found.peak_index()]) == 5
    assert found.most()["temporaries"] == 30
    assert found.most()["gradients"] == 40


def test_a_collective_buffer_that_backward_needs_is_an_activation() -> None:
    found = timeline([Block(5, 1, "", False, in_collective=True, death=9)], [4], last=10)
    assert found.most()["activations"] == 5


def test_forward_of_the_next_micro_batch_waits_for_the_next_backward() -> None:
    """What is born between two backward passes is an activation only if it outlives the second's start."""
    blocks = [Block(3, 6, "", False, death=7), Block(4, 6, "", False, death=12)]
    found = timeline(blocks, [4, 8], last=12)
    assert found.most()["temporaries"] == 3
    assert found.most()["activations"] == 4


@pytest.mark.parametrize("points", [1, 3, 50])
def test_thinning_keeps_the_peak(points: int) -> None:
    blocks = [Block(size, moment, "", True, death=moment + 1) for moment, size in enumerate((1, 9, 2, 8, 3, 7))]
    whole = timeline(blocks, [0], last=6)
    assert whole.thinned(points).total.max() == whole.total.max() == 9
