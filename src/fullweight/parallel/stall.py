"""Why a run stands still, told from what each rank says of itself: pure functions over plain values.

Who is to blame, in this order: ranks that do not answer; ranks that work while others wait for them in a
collective; ranks that wait somewhere else than most. A rank waits when the innermost Python frame of one of its
threads lies in torch's collectives. That is seen of host threads: a rank whose device computes looks the same as
one whose device waits, and then only the place tells.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from fullweight.parallel.rendezvous import named

OWN_THREADS = "fullweight-"
_PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVES = "distributed_c10d.py"


@dataclass(frozen=True)
class Seen:
    """What is known of a rank: its place in words, a sortable form of it, and how long it has been there."""

    rank: int
    place: str
    position: tuple[int, int, str, str]  # step, number of the phase, detail, line: less is behind
    seconds: float  # it has been there, or, when it does not answer, since it was last heard of
    answers: bool
    waits: bool  # in a collective
    line: str  # where its training thread is in the code; empty when it does not answer


def doing() -> tuple[bool, str]:
    """(whether this process waits in a collective, our innermost line and the innermost of its main thread)."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {i: f for i, f in sys._current_frames().items() if not names.get(i, "").startswith(OWN_THREADS)}
    main = frames[threading.main_thread().ident or 0]
    return any(_waits(frame) for frame in frames.values()), _where(main)


def blamed(seen: list[Seen]) -> tuple[list[int], str]:
    """(ranks that hold the others up, why); no rank when all wait in the same place."""
    if silent := [s.rank for s in seen if not s.answers]:
        return silent, f"{_verb(silent, 'does', 'do')} not answer (stopped, gone or cut off)"
    busy = [s.rank for s in seen if not s.waits]
    if len(busy) == len(seen):
        return [], "every rank is at work and none waits (raise launch.stall_seconds if a phase may take so long)"
    if busy:
        return busy, f"{_verb(busy, 'works', 'work')} while the others wait in a collective"
    places = Counter(s.position for s in seen)
    if len(places) == 1:
        return [], "every rank waits in the same place"
    fewest = min(places.values())
    if list(places.values()).count(fewest) > 1:
        return [], "the ranks wait in different places, and no place is that of fewer ranks than the others"
    odd = [s.rank for s in seen if places[s.position] == fewest]
    return odd, f"{_verb(odd, 'is', 'are')} in another place than the others"


def report(seen: list[Seen], bound_seconds: float) -> str:
    """One message: who holds the run up, why, and where every rank is."""
    ranks, why = blamed(seen)
    who = f"{named(ranks)} {why}" if ranks else why
    lines = [f"the run stood still for more than {bound_seconds:g} s: {who}"]
    groups: dict[tuple[str, bool, bool, str], list[Seen]] = {}
    for each in seen:
        groups.setdefault((each.place, each.answers, each.waits, each.line), []).append(each)
    for (place, answers, waits, line), members in groups.items():
        longest = max(m.seconds for m in members)
        what = f"for {longest:.0f} s {'waiting' if waits else 'at work'} at {line}"
        silent = f"last heard of {longest:.0f} s ago"
        lines.append(f"  {named([m.rank for m in members])}: {place}, {what if answers else silent}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Straggler:
    """A rank that works much longer than the others for the same steps."""

    rank: int
    through_step: int
    busy_seconds: float  # over the last steps
    median_seconds: float  # of the other ranks

    @property
    def ratio(self) -> float:
        return self.busy_seconds / max(self.median_seconds, 1e-9)

    def __str__(self) -> str:
        """
        >>> str(Straggler(3, 20, 8.0, 2.0))
        'rank 3 worked 8.0 s in its last steps (through step 20), the other ranks 2.0 s (median): 4.0 times'
        """
        return (
            f"rank {self.rank} worked {self.busy_seconds:.1f} s in its last steps (through step "
            f"{self.through_step}), the other ranks {self.median_seconds:.1f} s (median): {self.ratio:.1f} times"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the ledger."""
        return {
            "rank": self.rank,
            "through_step": self.through_step,
            "busy_seconds": self.busy_seconds,
            "median_seconds": self.median_seconds,
        }


def stragglers(busy: Mapping[int, tuple[int, float]], ratio: float, least_seconds: float) -> list[Straggler]:
    """Ranks whose own work takes more than `ratio` times the others' median, and `least_seconds` more than it.

    `busy` has, by rank, the last step done and the seconds of own work over the last steps.
    """
    found = []
    for rank, (step, seconds) in busy.items():
        others = [value for other, (_, value) in busy.items() if other != rank]
        typical = median(others) if others else seconds
        if seconds > ratio * typical and seconds - typical > least_seconds:
            found.append(Straggler(rank, step, seconds, typical))
    return found


def _waits(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    if path.name == _COLLECTIVES:
        return True
    inside = "distributed" in path.parts and "torch" in path.parts
    return inside and "wait" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def _where(innermost: FrameType) -> str:
    ours: FrameType | None = innermost
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    frames = [innermost] if ours is None or ours is innermost else [ours, innermost]
    return " > ".join(f"{_short(f.f_code.co_filename)}:{f.f_lineno} {f.f_code.co_name}" for f in frames)


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _verb(ranks: list[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many
