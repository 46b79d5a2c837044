"""When FSDP has a block's weights whole, and what its exchanges hold, over sizes.

As torch's FSDP2 does it (`_fsdp_param_group.py` of torch 2.13): before a unit runs its parts are gathered in one
buffer and copied out; a forward pass keeps the buffer until the next unit's; a backward pass asks for the unit
before it ahead of time; gradients wait whole until the unit's backward pass ends, are copied to one buffer for
their reduction, which stays until the next unit reduces. A unit's experts are a unit of their own where they are
dealt over ranks, and attention's heads a group of their own. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fullweight.planner.shards import Held
from fullweight.planner.tape import COMMUNICATION, GATHERED, GRADIENTS, Block, Tape

_FP32 = 4
Hook = Callable[[Sequence[Block], Sequence[Block]], Sequence[Block]]


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together: bytes whole, as they are exchanged, and of this rank's part."""

    whole: int
    part: int
    exact: int  # whole, without what evens the parts out
    by_rows: int = 0  # of the whole, what is cut inside of matrices and has to be put in order
    copied: bool = False  # not cut at all: copies elsewhere, with which gradients are summed
    summed: bool = False  # over copies: what is reduced is held past the sum, until the backward pass or ...
    # ... in a pipeline the next reduction of the same group ends it

    @property
    def buffer(self) -> int:
        """Bytes of the buffer that it is gathered in."""
        return 0 if self.copied else self.whole


@dataclass(frozen=True)
class Unit:
    """The groups of a block, or of what lies outside of all, and of its experts where they are dealt."""

    groups: tuple[Group, ...]
    experts: tuple[Group, ...]
    sharded: frozenset[str]  # names that FSDP has
    routed: frozenset[str]

    @property
    def whole(self) -> int:
        return sum(group.whole for group in (*self.groups, *self.experts))

    @property
    def summed(self) -> int:
        """Bytes of what was reduced and is held while a backward pass goes on, beside gradients that are there."""
        return sum(group.part for group in (*self.groups, *self.experts) if group.summed)

    @property
    def last(self) -> int:
        """Bytes of the buffer that a forward pass leaves behind."""
        groups = self.experts or self.groups
        return groups[-1].buffer if groups else 0

    def asked_for(self, before: Unit) -> tuple[Group, ...]:
        """The groups of the unit before that this one's backward pass asks for ahead of time."""
        several = len(self.groups) > 1 and not self.experts
        return before.groups if several else before.groups[-1:]


NOTHING = Unit((), (), frozenset(), frozenset())


def unit_of(parameters: Sequence[Held], dealt: bool) -> Unit:
    """`dealt`: experts are on an axis of their own."""
    have = [h for h in parameters if h.gathered]
    experts = [h for h in have if h.routed and dealt]
    heads = [h for h in have if h.own_axis and not h.routed]
    rest = [h for h in have if h not in experts and h not in heads]
    return Unit(
        tuple([_group(part) for part in (rest, heads) if part]),
        tuple([_group(experts)] if experts else []),
        frozenset(_short(h.name) for h in have),
        frozenset(_short(h.name) for h in experts),
    )


def _group(parameters: Sequence[Held]) -> Group:
    return Group(
        _FP32 * sum(h.padded for h in parameters),
        _FP32 * sum(h.padded // h.sharers for h in parameters),
        _FP32 * sum(h.whole for h in parameters),
        _FP32 * sum(h.padded for h in parameters if h.by_rows),
        parameters[0].sharers == 1,
        parameters[0].copies > 1,
    )


def _short(name: str) -> str:
    """Without the layer's prefix."""
    for prefix in ("layers.", "mtp."):
        if name.startswith(prefix):
            return name.split(".", 2)[2]
    return name


@dataclass
class Sharding:
    """One unit through its passes on a tape.

    `first`: the sums over micro-batches begin with this one. `before` are the groups of the unit that a backward
    pass gathers ahead of time. Buffers that others left are `left_gather` and `left_reduce`.
    """

    tape: Tape
    unit: Unit
    first: bool
    before: tuple[Group, ...] = ()
    held: dict[Group, Block] = field(default_factory=dict)  # what each group's last reduction left
    left_gather: Block | None = None
    left_reduce: list[Block] = field(default_factory=list)
    ready: dict[str, dict[int, Block]] = field(default_factory=dict)
    whole: dict[str, list[Block]] = field(default_factory=dict)
    gradients: dict[str, list[Block]] = field(default_factory=dict)
    kept: list[Block] = field(default_factory=list)

    def groups(self, part: str) -> tuple[Group, ...]:
        return self.unit.experts if part == "experts" else self.unit.groups

    def enter(self, part: str) -> None:
        """Before a forward pass, or before it is made again."""
        if part in self.whole:
            return
        found = []
        waiting = self.ready.pop(part, {})
        for i, group in enumerate(self.groups(part)):
            buffer = waiting.pop(i, None) or self.tape.new(group.buffer, COMMUNICATION)
            self.left_gather = None
            found += self._copied_out(group)
            self.left_gather = buffer
        self.whole[part] = found

    def leave(self, part: str) -> None:
        """After a forward pass."""
        self.whole.pop(part, None)

    def ask(self, part: str) -> None:
        """Gather ahead of time, in backward."""
        if part not in self.whole and part not in self.ready:
            buffers = [self.tape.new(group.buffer, COMMUNICATION) for group in self.groups(part)]
            self.ready[part] = dict(enumerate(buffers))

    def ahead_of(self, part: str) -> Hook:
        """For the output of a part: what its backward pass begins with."""

        def hook(gradients: Sequence[Block], saved: Sequence[Block]) -> Sequence[Block]:
            self.before_backward(part)
            return gradients

        return hook

    def after(self, part: str) -> Hook:
        """For the inputs of a part: what its backward pass ends with."""

        def hook(gradients: Sequence[Block], saved: Sequence[Block]) -> Sequence[Block]:
            self.after_backward(part)
            return gradients

        return hook

    def before_backward(self, part: str) -> None:
        """What the pass needs, and the request for what comes next."""
        if part not in self.whole:
            found = []
            waiting = self.ready.pop(part, {})
            for i, group in enumerate(self.groups(part)):
                buffer = waiting.pop(i, None) or self.tape.new(group.buffer, COMMUNICATION)
                found += self._copied_out(group)
                del buffer
            self.whole[part] = found
        if part == "block" and self.unit.experts:
            self.ask("experts")
        else:
            self.kept += [self.tape.new(group.buffer, COMMUNICATION) for group in self.before]

    def _copied_out(self, group: Group) -> list[Block]:
        whole = self.tape.new(group.whole, GATHERED)
        if group.by_rows:
            self.tape.new(group.by_rows)
        return [whole]

    def weigh(self, name: str, block: Block) -> None:
        """A weight's gradient: summed over ranks later, or here at once."""
        if name in self.unit.sharded:
            part = "experts" if name in self.unit.routed else "block"
            self.gradients.setdefault(part, []).append(block)
        elif self.first:
            self.tape.mark(block, GRADIENTS)
            self.kept.append(block)

    def after_backward(self, part: str) -> None:
        """Gradients are reduced, weights let go."""
        self.whole.pop(part, None)
        given = self.gradients.pop(part, [])
        groups = self.groups(part)
        for i, group in enumerate(reversed(groups)):
            if i == 0:
                self.left_reduce.clear()
            again = self.tape.new(group.by_rows) if group.by_rows else None
            self.left_reduce.append(self.tape.new(group.whole, None if group.copied else COMMUNICATION))
            if i == len(groups) - 1:
                given.clear()
            del again
            if group.copied:
                self.tape.new(group.whole)  # divided by 1 on its way
            self.held.pop(group, None)
            out = self.tape.new(group.part, GRADIENTS if self.first else COMMUNICATION)
            if self.first or group.summed:
                self.kept.append(out)
            del out
