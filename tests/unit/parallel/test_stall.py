"""Who is blamed when a run stands still, from what the ranks say of themselves."""

from __future__ import annotations

import threading

from fullweight.parallel.rendezvous import named
from fullweight.parallel.stall import Seen, Straggler, blamed, doing, report, stragglers


def seen(rank: int, step: int = 7, *, answers: bool = True, waits: bool = True, line: str = "a.py:1 f") -> Seen:
    return Seen(rank, f"forward of step {step}", (step, 2, "", line), 30.0 + rank, answers, waits, line)


def test_a_rank_that_does_not_answer_is_blamed_before_anything_else() -> None:
    """Even when another one is busy."""
    ranks, why = blamed([seen(0), seen(1, answers=False, waits=False), seen(2, waits=False)])
    assert ranks == [1]
    assert "does not answer" in why


def test_a_rank_that_works_holds_up_those_that_wait() -> None:
    """It may even be in the same phase."""
    assert blamed([seen(0), seen(1), seen(2, waits=False)])[0] == [2]


def test_ranks_that_wait_in_another_place_than_most_are_blamed() -> None:
    """Ahead (it skipped a collective) or behind."""
    assert blamed([seen(0), seen(1), seen(2), seen(3, step=8)])[0] == [3]
    assert blamed([seen(0), seen(1), seen(2), seen(3, line="b.py:2 g")])[0] == [3]


def test_nobody_is_blamed_without_a_reason() -> None:
    """All in one place, all at work, or one against one."""
    assert blamed([seen(0), seen(1)]) == ([], "every rank waits in the same place")
    assert blamed([seen(0, waits=False), seen(1, waits=False)])[0] == []
    assert blamed([seen(0), seen(1, step=8)])[0] == []


def test_a_thousand_ranks_are_reported_in_a_few_lines() -> None:
    """Ranks in one place share a line."""
    everyone = [seen(rank, answers=rank != 513) for rank in range(1024)]
    text = report(everyone, 300)
    assert "stood still for more than 300 s: rank 513 does not answer" in text
    assert "ranks 0-512, 514-1023: forward of step 7" in text
    assert len(text.splitlines()) == 3


def test_ranks_in_words() -> None:
    """Runs are shortened."""
    assert named([3]) == "rank 3"
    assert named([5, 0, 1, 2]) == "ranks 0-2, 5"


def test_a_thread_of_ours_is_not_taken_for_the_training_thread() -> None:
    """The watch's own threads do not count as waiting or working; the main thread's line is told."""
    waits, line = doing()
    assert not waits
    assert "doing" in line
    names = []
    thread = threading.Thread(target=lambda: names.append(doing()[1]), name="fullweight-test")
    thread.start()
    thread.join()
    assert "test_a_thread_of_ours" in names[0] or "join" in names[0] or "wait" in names[0]


def test_a_straggler_works_far_longer_than_the_others_median() -> None:
    """By ratio and by an amount that matters; two stragglers of five are both found."""
    busy = {0: (20, 2.0), 1: (20, 2.2), 2: (20, 9.0), 3: (20, 1.9), 4: (20, 8.0)}
    found = stragglers(busy, ratio=3.0, least_seconds=1.0)
    assert [s.rank for s in found] == [2, 4]
    assert found[0] == Straggler(2, 20, 9.0, 2.1)
    assert stragglers({0: (20, 0.1), 1: (20, 0.9)}, ratio=3.0, least_seconds=1.0) == []
    assert stragglers({0: (20, 4.0), 1: (20, 9.0)}, ratio=3.0, least_seconds=1.0) == []
