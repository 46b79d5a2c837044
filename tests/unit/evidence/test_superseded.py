"""What is superseded, against the definition read literally: by any later beginning that goes back before it."""

from __future__ import annotations

import random

from fullweight.evidence.superseded import Superseded


def test_as_the_format_defines_it() -> None:
    """Hundreds of histories with several interruptions, starts among them, each line by the definition."""
    draw = random.Random(5)
    seen = set()
    for _ in range(300):
        lines = [(draw.choice(["step", "step", "step", "resume", "start"]), draw.randrange(6)) for _ in range(12)]
        begins = [(i, what, step) for i, (what, step) in enumerate(lines, 1) if what != "step"]
        superseded = Superseded(begins)
        for number, (_, step) in enumerate(lines, 1):
            later = [b for b in begins if b[0] > number]
            expected = any(what == "start" or step > back for _, what, back in later)
            assert superseded(number, step) is expected, (lines, number)
            seen.add((expected, len(later) > 1))
    assert len(seen) == 4


def test_without_interruptions_all_stand() -> None:
    superseded = Superseded([(1, "start", 0)])
    assert not any(superseded(number, step) for number in (1, 2, 9) for step in (0, 7))
