"""Memory of a stretch of work in pure arithmetic: what is born, what dies, and how stretches add up.

`Tape` writes down births and deaths of blocks as `fullweight rehearse` does of storages. A block lives as long as
Python has a reference to it, as a tensor's storage does, so that the passes of `passes.py` need not say when
anything is freed. `Tape.cut` settles the categories and keeps of a stretch what its neighbours need: what it adds
to each category in the end, and the most that it adds on the way. Profiles add up exactly: a step of thousands of
passes is a sum over a few that differ.

Sizes are bytes. Categories are those of a rehearsal, settled by its rules (`rehearse/memory.py`): what is made in
forward and outlives it is an activation; of the rest, what a collective reads or writes is communication.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add

CATEGORIES = ("parameters", "optimizer", "gradients", "gathered", "activations", "communication", "temporaries")
PARAMETERS, OPTIMIZER, GRADIENTS, GATHERED, ACTIVATIONS, COMMUNICATION, TEMPORARIES = range(7)
_NONE: tuple[int, ...] = (0,) * 7


@dataclass(slots=True, unsafe_hash=True)
class Profile:
    """Bytes by category that a stretch leaves behind (`net`), the most of each on its way above what was there
    before (`most`), and of all together (`peak`).

    Not frozen, and added up by C, because a search adds millions; nothing changes one.
    """

    net: tuple[int, ...] = _NONE
    most: tuple[int, ...] = _NONE
    peak: int = 0

    def __add__(self, other: Profile) -> Profile:
        """This stretch, then the other."""
        return together((self, other))


NO_CHANGE = Profile()


def moved(**changes: int) -> Profile:
    """Bytes by category that come and stay or, below zero, go, all at once."""
    net = tuple([changes.get(name, 0) for name in CATEGORIES])
    return Profile(net, tuple([n if n > 0 else 0 for n in net]), max(sum(net), 0))


def passing(category: int, num_bytes: int) -> Profile:
    """Bytes that come and go."""
    return Profile(_NONE, tuple([num_bytes if i == category else 0 for i in range(7)]), num_bytes)


def together(profiles: Iterable[Profile]) -> Profile:
    """One after the other."""
    net, most, peak = _NONE, _NONE, 0
    for profile in profiles:
        peak = max(peak, sum(net) + profile.peak)
        most = tuple(map(max, most, map(add, net, profile.most)))
        net = tuple(map(add, net, profile.net))
    return Profile(net, most, peak)


class Block:
    """One storage."""

    __slots__ = ("index", "num_bytes", "tape")

    def __init__(self, tape: Tape, num_bytes: int, index: int) -> None:
        self.tape, self.num_bytes, self.index = tape, num_bytes, index

    def __del__(self) -> None:
        self.tape.events.append((self.index, -self.num_bytes))


class Tape:
    """Births and deaths in order. What is made while `forward` is set and lives on is an activation."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []  # (number of the block, bytes; below zero at its death)
        self.forward = True
        self._marks: list[int] = []
        self._open: set[int] = set()  # made in this stretch of forward, without a mark

    def new(self, num_bytes: float, mark: int | None = None) -> Block:
        """A block of so many bytes, of a category that is known or will be."""
        index = len(self._marks)
        block = Block(self, int(num_bytes), index)
        self._marks.append(TEMPORARIES if mark is None else mark)
        if mark is None and self.forward:
            self._open.add(index)
        self.events.append((index, block.num_bytes))
        return block

    def sent(self, *blocks: Block) -> None:
        """Collectives read or write these."""
        for block in blocks:
            if self._marks[block.index] == TEMPORARIES:
                self._marks[block.index] = COMMUNICATION

    def mark(self, block: Block, category: int) -> None:
        """Say what it is, from its birth on; to be said in the stretch where it was born."""
        self._marks[block.index] = category
        self._open.discard(block.index)

    def cut(self) -> Profile:
        """The profile of all since the last cut; in it, what was made in forward and lives on is an activation."""
        alive = set(self._open)
        alive.difference_update([index for index, size in self.events if size < 0])
        for index in alive:
            self._marks[index] = ACTIVATIONS
        marks, now, most, total, peak = self._marks, [0] * 7, [0] * 7, 0, 0
        for index, size in self.events:
            category = marks[index]
            now[category] += size
            total += size
            if size > 0:
                most[category] = max(most[category], now[category])
                peak = max(peak, total)
        self.events, self._open = [], set()
        return Profile(tuple(now), tuple(most), peak)
