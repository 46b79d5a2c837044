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

CATEGORIES = ("parameters", "optimizer", "gradients", "gathered", "activations", "communication", "temporaries")
PARAMETERS, OPTIMIZER, GRADIENTS, GATHERED, ACTIVATIONS, COMMUNICATION, TEMPORARIES = range(7)
_NONE = (0,) * 7


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes by category that a stretch leaves behind (`net`), the most of each on its way above what was there
    before (`most`), and of all together (`peak`), with what that is made of (`at_peak`)."""

    net: tuple[int, ...] = _NONE
    most: tuple[int, ...] = _NONE
    peak: int = 0
    at_peak: tuple[int, ...] = _NONE

    def __add__(self, other: Profile) -> Profile:
        """This stretch, then the other."""
        net, most = self.net, self.most
        peak, at_peak = sum(net) + other.peak, self.at_peak
        if peak > self.peak:
            at_peak = tuple([a + b for a, b in zip(net, other.at_peak, strict=True)])
        return Profile(
            tuple([a + b for a, b in zip(net, other.net, strict=True)]),
            tuple([max(m, a + b) for m, a, b in zip(most, net, other.most, strict=True)]),
            max(self.peak, peak),
            at_peak,
        )


NO_CHANGE = Profile()


def moved(**changes: int) -> Profile:
    """Bytes by category that come and stay or, below zero, go, all at once."""
    net = tuple([changes.get(name, 0) for name in CATEGORIES])
    most = tuple([max(n, 0) for n in net])
    return Profile(net, most, max(sum(net), 0), net if sum(net) > 0 else _NONE)


def passing(category: int, num_bytes: int) -> Profile:
    """Bytes that come and go."""
    most = tuple([num_bytes if i == category else 0 for i in range(7)])
    return Profile(_NONE, most, num_bytes, most)


def together(profiles: Iterable[Profile]) -> Profile:
    """One after the other."""
    found = Profile()
    for profile in profiles:
        found = found + profile
    return found


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
        at_peak: tuple[int, ...] = _NONE
        for index, size in self.events:
            category = marks[index]
            now[category] += size
            total += size
            most[category] = max(most[category], now[category])
            if total > peak:
                peak, at_peak = total, tuple(now)
        self.events, self._open = [], set()
        return Profile(tuple(now), tuple(most), peak, at_peak)
