"""Which windows there are, and that a draw can be repeated by anybody from its description."""

from __future__ import annotations

import hashlib

import pytest

from fullweight.audit.windows import Window, candidates, draw
from fullweight.core.errors import ConfigError


def test_a_window_is_two_steps() -> None:
    """The first is the state that is started from; anything else is refused with an example."""
    assert Window.parse("20:25") == Window(20, 25)
    assert list(Window(2, 4).steps) == [3, 4]
    for text in ("", "20", "25:20", "5:5", "a:b", "-1:4", "1:2:3"):
        with pytest.raises(ConfigError, match="such as 20:25"):
            Window.parse(text)


def test_candidates_lie_between_kept_states() -> None:
    """Neighbours, oldest first; from the beginning only when one state is all there is."""
    assert candidates([9, 3, 6]) == [Window(3, 6), Window(6, 9)]
    assert candidates([4]) == [Window(0, 4)]
    assert candidates([]) == []


def test_a_draw_follows_its_description() -> None:
    """By hand for the first; without repetition; another head or another value is another draw."""
    windows = [Window(i, i + 1) for i in range(100)]
    head, value = "ab" * 32, "beacon"
    text = "fullweight replay\n" + head + "\n" + value + "\n0"
    first = windows[int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100]
    drawn = draw(windows, head, value, 20)
    assert drawn[0] == first
    assert len(set(drawn)) == 20
    assert drawn[:5] == draw(windows, head, value, 5)
    assert drawn != draw(windows, "cd" * 32, value, 20)
    assert drawn != draw(windows, head, "other", 20)
    assert sorted(draw(windows[:3], head, value, 9)) == windows[:3]
