"""One pipeline rank's step as a sum of profiles: gathers, passes in the schedule's order, reductions.

Each element of a pass (embedding, a block of one kind, the head with the MTP block) has profiles (`elements.py`)
that `tape.py` adds up; micro-batches and layers of one kind are the same.
What passes between stages is held as torch's schedules hold it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.parts import Part
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner.elements import Around, Pass
from fullweight.planner.operations import BF16, FP32, INT64
from fullweight.planner.passes import Row
from fullweight.planner.schedule import Action, actions, one_forward_one_backward
from fullweight.planner.sharding import NOTHING, Group, Unit
from fullweight.planner.tape import ACTIVATIONS, COMMUNICATION, TEMPORARIES, Profile, moved, passing, together


@dataclass(frozen=True)
class Held:
    """A rank's gradients in bytes, and its units."""

    gradients: int
    root: Unit
    blocks: tuple[Unit, ...]  # of all layers, the MTP block last
    parts: tuple[Part, ...]  # of the rank's stages, in order
    stages: tuple[int, ...]


PassOf = Callable[..., Pass]


class Step:
    """The step of one pipeline rank. `passes` gives the profile of an element (`memory.py` keeps those known)."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        layout: Layout,
        row: Row,
        micro_batches: int,
        held: Held,
        passes: PassOf,
    ) -> None:
        self.config, self.parallel, self.layout, self.row = config, parallel, layout, row
        self.micro_batches, self.held, self.passes = micro_batches, held, passes
        self.staged = layout.pipeline > 1
        self.hooked = not self.staged or parallel.reshard_after == "micro_batch"
        self.late = self.staged and parallel.schedule in ("zero_bubble", "zbv")
        self.first_part = next((p for p in held.parts if p.is_first), None)
        self.last_part = next((p for p in held.parts if p.is_last), None)
        self.mtp = config.num_nextn_predict_layers > 0
        d = config.hidden_size
        self.tokens = row.here * d * BF16
        self.streams = self.tokens * config.hc_mult
        self.payload = self.streams + (self.tokens if self.mtp else 0)
        self.vocabulary = config.vocab_size * d * FP32

    def profile(self) -> Profile:
        """All of it but what is there for good and what the optimiser does."""
        if not self.staged:
            if self.micro_batches == 1:
                return self._plain(first=True)
            # the first one holds no more than the second, which finds its gradients and its graph
            found = moved(gradients=self.held.gradients, activations=self._left_by_first())
            return found + self._plain(first=False)
        start = Profile() if self.hooked else self._root_gather()
        order = self._one_by_one() if self.parallel.virtual_stages == 1 else self._by_actions()
        reduced = [] if self.hooked else self._reductions()
        return together([start, order, *reduced])

    # ---- one micro-batch ----------------------------------------------------------------------------

    def _plain(self, first: bool) -> Profile:
        """Forward and backward of all layers."""
        (part,) = self.held.parts
        elements, units = self._elements(part, first), self._units(part)
        forward = [self._root_gather(), *[e.forward for e in elements], moved(communication=-units[-1].last)]
        backward = [self._asked_by_root(part), *[e.backward for e in reversed(elements)]]
        if not first:
            forward.append(moved(activations=-self._owned(elements)))
        ended = moved(communication=0 if first else -self._summed(part))
        return together([*forward, *backward, *self._root_reduction(first, units[0]), ended])

    def _summed(self, part: Part) -> int:
        """Bytes that a pass leaves of what it summed over copies."""
        return sum(unit.summed for unit in (self.held.root, *self._units(part)))

    def _owned(self, elements: Sequence[Pass]) -> int:
        """What the operations of a micro-batch own beside what they kept: it goes with the graph, when the next
        micro-batch has its own."""
        return sum(e.forward.net[ACTIVATIONS] + e.backward.net[ACTIVATIONS] for e in elements[1:])

    def _left_by_first(self) -> int:
        """Activations that are there when the second micro-batch begins."""
        elements = self._elements(self.held.parts[0], first=False)
        return sum(e.forward.net[ACTIVATIONS] + e.backward.net[ACTIVATIONS] for e in elements)

    def _elements(self, part: Part, first: bool, root_comes: bool = True, again: bool = False) -> list[Pass]:
        """In the order of a forward pass.

        `root_comes`: what lies outside of blocks is gathered before it; `again`: what was summed over copies
        before is still held.
        """
        units = self._units(part)
        found = [self._context(part)]
        if part.is_first:
            found.append(self._embedding(first, part))
        count = len(part.layers)
        common: dict[str, Any] = {
            "policy": self.parallel.recompute,
            "hooked": self.hooked,
            "first": first,
            "late": self.late,
            "root": self.held.root.sharded,
            "uses": 2 if self.mtp else 1,
            "keeps_graph": not self.staged,
            "again": again,
        }
        # the stage that runs first finds what was gathered for the root
        begin = self.held.root if part is self.held.parts[0] and root_comes else None
        end = self._left_over(units) if self.staged and self.hooked and not first else None
        for i, layer in enumerate(part.layers):
            around = Around(
                **common,
                unit=self._unit(self.held.blocks[layer]),
                before=(units[i - 1] if i else begin) if self.hooked else None,
                asks=self.hooked and i > 0,
                asked=self._asked(units, i),
                ahead=units[-1] if i == 0 and self._mistaken(part) else None,
                behind=units[i + 1] if self.hooked and i + 1 < len(units) else end,
                holds_input=self.staged and i == 0 and not part.is_first,
                holds_gradient=self.staged and i == count - 1 and not part.is_last,
            )
            found.append(self._whole(self.passes("block", self.row, layer, around), units, i, begin, first))
        if part.is_last:
            unit = self.held.blocks[-1] if self.mtp else NOTHING
            asked = self._asked(units, len(units) - 1) if self.mtp else 0
            tail = Around(
                **common,
                unit=self._unit(unit),
                before=units[count - 1] if self.hooked else None,
                behind=end,
                asks=self.hooked,
                asked=asked,
            )
            made = self.passes("tail", self.row, 0, tail)
            found.append(self._whole(made, units, count, None, first) if self.mtp else made)
        return found

    def _mistaken(self, part: Part) -> int:
        """Bytes that a backward pass gathers for another micro-batch.

        Where nothing lies outside of blocks, FSDP goes on from a micro-batch's first unit with the last one of
        another; its bytes wait for that unit's next pass.
        """
        units = self._units(part)
        if not (self.staged and self.hooked) or self.held.root.groups or len(units) < 2:
            return 0
        return sum(group.buffer for group in units[0].asked_for(units[-1]))

    def _unit(self, unit: Unit) -> Unit:
        """What a pass has to know of it: where weights stay whole, only which of them are sharded."""
        return unit if self.hooked else replace(unit, groups=(), experts=())

    def _whole(self, made: Pass, units: Sequence[Unit], place: int, begin: Unit | None, first: bool) -> Pass:
        """A pass of a stage whose weights stay, with their gathering before the first one. A buffer is held until
        the next is there."""
        if self.hooked or not first:
            return made
        before = units[place - 1] if place else begin
        left, found = 0 if before is None else before.last, []
        for group in (*units[place].groups, *units[place].experts):
            found += [moved(communication=group.buffer), moved(communication=-left), moved(gathered=group.whole)]
            if group.by_rows:
                found.append(passing(TEMPORARIES, group.by_rows))
            left = group.buffer
        return replace(made, forward=together([*found, made.forward]))

    def _asked(self, units: Sequence[Unit], place: int) -> int:
        """How many of a unit's groups are gathered before its backward pass begins."""
        if not self.hooked or not units[place].groups:
            return 0
        if place + 1 < len(units):
            return len(units[place + 1].asked_for(units[place]))
        return min(len(self.held.root.groups), 1)

    def _left_over(self, units: Sequence[Unit]) -> Unit:
        """Whose reduction was the last of the backward pass before: its buffer is still there."""
        return self.held.root if self.held.root.groups else units[0]

    def _units(self, part: Part) -> list[Unit]:
        units = [self.held.blocks[layer] for layer in part.layers]
        return [*units, self.held.blocks[-1]] if part.is_last and self.mtp else units

    def _context(self, part: Part) -> Pass:
        """Rotary tables, and what says which token belongs where."""
        row, rope = self.row, self.config.qk_rope_head_dim // 2 * FP32
        tables = 2 * 2 * rope * (row.here + (row.span if self.layout.tensor > 1 else 0))
        # what is looked at of the row's tables, which micro-batches hold for the step, and documents and positions
        sliced = self.layout.num_slices > 1
        batch = row.tokens * (7 if sliced else 2) * INT64
        size = tables + row.here * (6 if sliced else 1) * INT64
        return Pass(moved(activations=batch + size), moved(activations=-size))

    def _embedding(self, first: bool, part: Part) -> Pass:
        row, d = self.row, self.config.hidden_size
        wide, narrow = (row.here + 1) * d * FP32, (row.here + 1) * d * BF16
        forward = [moved(temporaries=wide), moved(temporaries=narrow), moved(temporaries=-wide)]
        forward.append(moved(activations=self.streams + (row.here + 1) * INT64))
        handed_on = self.tokens if self.mtp and not part.is_last else 0
        # the embedding lives as long as the pass through this part's blocks may read it
        forward.append(moved(temporaries=-narrow, activations=handed_on))
        following = self.tokens if self.mtp and part.is_last else 0
        sharded = "embed.weight" in self.held.root.sharded
        one = [
            moved(temporaries=self.tokens),
            moved(temporaries=-self.streams),
            moved(temporaries=2 * narrow),
            moved(temporaries=-narrow - self.tokens - following),
            moved(temporaries=wide),
            moved(temporaries=-narrow),
        ]
        name = "temporaries" if sharded or not first else "gradients"
        one += [moved(**{name: self.vocabulary}), moved(temporaries=-wide, activations=-(row.here + 1) * INT64)]
        if not first and not (self.hooked and sharded):
            one.append(moved(**{name: -self.vocabulary}))
        return Pass(together(forward), together(one))

    # ---- the root's parameters ----------------------------------------------------------------------

    def _root_gather(self) -> Profile:
        """Its last buffer stays until the first block's."""
        found = Profile()
        for group in self.held.root.groups:
            found = found + moved(communication=group.buffer) + moved(gathered=group.whole)
        return found

    def _asked_by_root(self, part: Part) -> Profile:
        """What a backward pass begins with: the last unit is asked for."""
        groups = self._units(part)[-1].groups[-1:] if self.held.root.groups else ()
        return moved(communication=sum(group.buffer for group in groups))

    def _root_gradients(self) -> dict[str, int]:
        """Whole, as they wait to be reduced."""
        waiting = {"activations": 0, "temporaries": 0}
        if "head.weight" in self.held.root.sharded:
            waiting["temporaries" if self.mtp else "activations"] += self.vocabulary
        if "embed.weight" in self.held.root.sharded:
            waiting["temporaries"] += self.vocabulary
        return waiting

    def _root_reduction(
        self, first: bool, before: Unit, *, stays: bool = False, again: bool = False
    ) -> list[Profile]:
        """After a backward pass; `before` is the unit that reduced last. The last buffer goes with the pass, or
        stays for the next one."""
        left = sum(group.whole for group in before.groups)
        found = []
        for group in self.held.root.groups:
            found += [moved(gathered=-group.whole, communication=-left), moved(communication=group.whole)]
            found.append(moved(**{name: -size for name, size in self._root_gradients().items()}))
            if first:
                found.append(moved(gradients=group.part))
            elif group.summed:
                found += [moved(communication=-group.part)] if again else []
                found.append(moved(communication=group.part))
            else:
                found.append(passing(COMMUNICATION, group.part))
            left = group.whole
        return found if stays else [*found, moved(communication=-left)]

    # ---- a pipeline's whole weights -----------------------------------------------------------------

    def _all_units(self) -> list[Unit]:
        return [self.held.root, *[unit for part in self.held.parts for unit in self._units(part)]]

    def _reductions(self) -> list[Profile]:
        """At the step's end, unit by unit."""
        found = [moved(gathered=0)]
        left: list[int] = []
        for unit in self._all_units():
            for groups in (unit.groups, unit.experts):
                for i, group in enumerate(groups):
                    found.append(moved(gathered=-group.whole))
                    if i == len(groups) - 1:
                        found.append(moved(communication=-sum(left)))
                        left = []
                    if group.by_rows:
                        found.append(passing(TEMPORARIES, group.by_rows))
                    found.append(moved(communication=group.whole))
                    found.append(self._given(unit, group))
                    found.append(moved(gradients=group.part))
                    left.append(group.whole)
        return [*found, moved(communication=-sum(left))]

    def _given(self, unit: Unit, group: Group) -> Profile:
        if unit is self.held.root:
            return moved(**{name: -size for name, size in self._root_gradients().items()})
        return moved(temporaries=-group.exact)

    # ---- schedules ----------------------------------------------------------------------------------

    def _passes(self, part: Part, first: bool) -> Pass:
        """Of a stage whose weights are gathered in its first pass, to stay."""
        elements = self._elements(part, first)
        forward = together([e.forward for e in elements])
        if first:
            forward = forward + moved(communication=-self._units(part)[-1].last)
        backward = together([e.backward for e in reversed(elements)])
        return Pass(forward, backward, together([e.weights for e in reversed(elements)]))

    def _alone(self, part: Part, kind: str, number: int, root: bool, waiting: int) -> Profile:
        """One pass of a stage whose weights come and go, of the first micro-batch, the second or a later one.

        `root`: those outside of blocks are whole already; `waiting`: bytes gathered for the last unit too early.
        """
        first, again = number == 0, number > 1
        elements, units = self._elements(part, first, not root, again), self._units(part)
        used = moved(communication=-waiting)
        if kind == "F":
            gathered = Profile() if root else self._root_gather()
            *before, behind = [e.forward for e in elements]
            return together([gathered, *before, used, behind, moved(communication=-units[-1].last)])
        gathered = Profile() if root else self._root_gather() + moved(communication=-self.held.root.last)
        passes = [self._asked_by_root(part), used, *[e.backward for e in reversed(elements)]]
        return together([gathered, *passes, *self._root_reduction(first, units[0], stays=True, again=again)])

    def _one_by_one(self) -> Profile:
        """One stage on each rank. What was sent or came last is held until the next of its kind."""
        (part,), (stage,) = self.held.parts, self.held.stages
        known: dict[tuple[str, int, bool, int], Profile] = {}
        came = moved(activations=0 if part.is_first else self.payload)
        handed_on = 0 if part.is_last else self.streams + (self.tokens if part.is_first and self.mtp else 0)
        gradient = 0 if part.is_last else self.payload
        given = 0 if part.is_first else self.payload
        found, waiting, sent, whole, early = Profile(), 0, 0, False, 0
        order = one_forward_one_backward(self.layout.pipeline, stage, self._traced())
        # the last send before the first backward pass is held until nothing but backward passes is left
        kept = min(self.layout.pipeline - stage, self.micro_batches) - 2
        stays, left = 0 if part.is_last or kept < 0 else handed_on + self._passed_on(part), 0
        for place, (kind, _, number) in enumerate(order):
            key = kind, min(number, 2), whole, early
            if key not in known:
                if self.hooked:
                    known[key] = self._alone(part, *key)
                else:
                    both = self._passes(part, number == 0)
                    known[key] = both.forward if kind == "F" else both.backward
            whole, early = self.hooked and kind == "F", self._mistaken(part) if kind == "B" else 0
            if kind == "F":
                found = found + came + known[key]
                continue
            found = found + moved(activations=gradient) + moved(activations=-waiting) + known[key]
            found = found + self._ended(part, handed_on, local=False)
            if number == kept:
                found, left = found + moved(activations=stays), stays
            if all(action[0] == "B" for action in order[place:]):
                found, left = found + moved(activations=-left), 0
            found = found + moved(communication=-sent)
            waiting, sent = gradient, given
        summed = self._summed(part) if self.hooked and self._traced() > 1 else 0
        return found + moved(activations=-waiting - left, communication=-sent - early - summed)

    def _passed_on(self, part: Part) -> int:
        """Of what a stage received, what it hands on as it is."""
        return 0 if part.is_first or part.is_last or not self.mtp else self.tokens

    def _traced(self) -> int:
        """Micro-batches that show the most: more of them repeat it."""
        return min(self.micro_batches, self.layout.pipeline + 1)

    def _ended(self, part: Part, handed_on: int, *, local: bool) -> Profile:
        """After a backward pass: what its micro-batch held goes, and its input's gradient is to be sent."""
        came = 0 if part.is_first or local else self.payload
        given = 0 if part.is_first else self.payload
        return moved(
            activations=-came - handed_on,
            temporaries=-(self.streams if not part.is_first else 0) - (self.tokens if self._returns(part) else 0),
            communication=given,
        )

    def _returns(self, part: Part) -> bool:
        """Whether the gradient of the next tokens' embedding comes out of this part's backward pass."""
        return part.is_last and self.mtp and not part.is_first

    def _by_actions(self) -> Profile:
        """Several stages on a rank: what is sent is held until the step ends."""
        order = actions(
            self.parallel.schedule, self.layout.pipeline, self.parallel.virtual_stages, self.micro_batches
        )
        mine: Sequence[Action] = order[self.held.stages[0]]
        parts = dict(zip(self.held.stages, self.held.parts, strict=True))
        passes = {(s, first): self._passes(part, first) for s, part in parts.items() for first in (True, False)}
        known: dict[tuple[str, int, bool], tuple[Profile, int, int]] = {}
        found, communication, activations = [], 0, 0
        for kind, stage, number in mine:
            key = kind, stage, number == 0
            if key not in known:
                known[key] = self._action(kind, stage, parts, passes[stage, number == 0])
            profile, sent, kept = known[key]
            found.append(profile)
            communication += sent
            activations += kept
        return together([*found, moved(communication=-communication, activations=-activations)])

    def _action(self, kind: str, stage: int, parts: dict[int, Part], one: Pass) -> tuple[Profile, int, int]:
        """(what it does, what of it is held until the step ends: sent gradients, activations)."""
        part = parts[stage]
        if kind in ("RF", "RB"):
            return moved(activations=self.payload), 0, 0
        if kind != "B":
            return {"F": one.forward, "W": one.weights}.get(kind, Profile()), 0, 0
        before_here, behind_here = stage - 1 in parts, stage + 1 in parts
        handed_on = 0 if part.is_last else self.streams + (self.tokens if part.is_first and self.mtp else 0)
        sends_out = not part.is_last and not behind_here
        sends_back = not part.is_first and not before_here
        freed = 0 if sends_out else handed_on
        came = 0 if part.is_first or before_here else self.payload
        kept = self.tokens if sends_out and not part.is_first and self.mtp else 0
        freed += came - min(kept, came)
        gradient = 0 if part.is_last or behind_here else self.payload
        given = 0 if part.is_first else self.payload
        formed = 0 if part.is_first else self.streams + (self.tokens if self._returns(part) else 0)
        changes = {"activations": -freed - gradient}
        if sends_back:
            changes |= {"temporaries": -formed, "communication": given}
        elif given:
            changes["temporaries"] = given - formed
        if behind_here:
            changes["temporaries"] = changes.get("temporaries", 0) - self.payload
        held = (handed_on if sends_out else 0) + min(kept, came)
        return one.backward + moved(**changes), given if sends_back else 0, held
