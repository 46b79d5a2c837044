"""The elements of a pass on one rank, each run once over sizes: a block of one kind, the head with the MTP block.

An element gives its profiles (`tape.py`) forward, backward, and of the weight gradients that a schedule puts off.
What it finds and leaves of its neighbours' buffers is part of what decides it (`Around`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.planner.graph import Graph, Value
from fullweight.planner.operations import BF16, SETS, Operations
from fullweight.planner.passes import Blocks, Ends, Row
from fullweight.planner.sharding import Sharding, Unit
from fullweight.planner.tape import COMMUNICATION, GRADIENTS, NO_CHANGE, Block, Profile, Tape

_ROOT = frozenset(("embed.weight", "head.weight"))


@dataclass(frozen=True)
class Pass:
    """Forward, backward, and the weight gradients that backward put off."""

    forward: Profile
    backward: Profile
    weights: Profile = NO_CHANGE


@dataclass(frozen=True)
class Around:
    """What decides an element's profile beside its kind.

    `hooked`: weights come and go with each pass. `first`: of the step's micro-batches. `before` and `behind` are
    the units whose forward passes are next to this one. `holds`: the schedule holds what came in from the stage
    before (input) or behind (gradient). `keeps_graph`: a micro-batch's loss is there until the next one's is.
    """

    policy: str
    hooked: bool
    first: bool
    late: bool
    unit: Unit
    root: frozenset[str]  # names outside of blocks that are sharded
    uses: int  # of the head in a pass
    asks: bool = False  # in backward, for the unit before
    asked: int = 0  # how many of its groups what is behind asks for
    before: Unit | None = None
    ahead: Unit | None = None  # of another micro-batch, whose gathering the backward pass asks for
    again: bool = False  # what an earlier backward pass summed over copies is still held
    behind: Unit | None = None
    holds_input: bool = False
    holds_gradient: bool = False
    keeps_graph: bool = False


def block_pass(config: DeepSeekV4Config, row: Row, layer: int, around: Around) -> Pass:
    """One block."""
    tape, graph, sharding, ops = _tools(around, row)
    size = row.here * config.hc_mult * config.hidden_size * BF16
    streams = graph.node(_identity, [None], [tape.new(size)])[0]
    held: list[Any] = [streams.block] if around.holds_input else []
    hooks = sharding if around.hooked else None
    block = Blocks(config, row, layer, around.policy, ops, hooks)
    tape.cut()
    if hooks is not None:
        hooks.enter("block")
    made = [block.mix(streams)]
    del streams
    if hooks is not None:
        hooks.leave("block")
    return _backward(around, ops, sharding, made, size, held, streams_only=True)


def tail_pass(config: DeepSeekV4Config, row: Row, around: Around) -> Pass:
    """Head and MTP block."""
    tape, graph, sharding, ops = _tools(around, row)
    tokens = row.here * config.hidden_size * BF16
    streams = graph.node(_identity, [None], [tape.new(tokens * config.hc_mult)])[0]
    mtp = config.num_nextn_predict_layers > 0
    following = graph.node(_identity, [None], [tape.new(tokens)])[0] if mtp else None
    held: list[Any] = [streams.block] if around.holds_input else []
    if following is not None:
        held.append(following.block)
    ends = Ends(config, row, around.policy, ops, sharding if around.hooked else None)
    tape.cut()
    made = [ends.predict(streams, following)]
    del streams, following
    return _backward(around, ops, sharding, made, 4, held)


def _identity(gradients: Sequence[Block], saved: Sequence[Block]) -> Sequence[Block]:
    return gradients


def _tools(around: Around, row: Row) -> tuple[Tape, Graph, Sharding, Operations]:
    tape = Tape()
    sharding = Sharding(tape, around.unit, around.first)
    if around.hooked:
        if around.before is not None and around.before.last:
            sharding.left_gather = tape.new(around.before.last, COMMUNICATION)
        if around.asks and around.before is not None:
            sharding.before = around.unit.asked_for(around.before)
    if around.ahead is not None:
        sharding.before = around.unit.asked_for(around.ahead)
    if around.again:
        for group in (*around.unit.groups, *around.unit.experts):
            if group.summed:
                sharding.held[group] = tape.new(group.part, COMMUNICATION)
    graph = Graph(tape)
    if around.keeps_graph:
        graph.outlives = []
    parts: list[Block] = []  # of the head's gradient, added up so far
    came = 0
    at_once = around.uses == 1 and SETS[row.operations].head_in_forward

    def weigh(name: str, block: Block) -> None:
        """A weight's gradient: kept where it waits for others or for its reduction, or added to what is kept."""
        nonlocal came
        if name == "head.weight" and around.uses * ops.head_parts > 1:
            if parts:
                block = tape.new(block.num_bytes)
                parts.clear()
            came += 1
            if came < around.uses * ops.head_parts:
                parts.append(block)
                return
        sharded = name in (around.root if name in _ROOT else around.unit.sharded)
        if around.hooked and name not in _ROOT:
            sharding.weigh(name, block)
        elif around.first or (around.hooked and sharded):
            if not sharded and not (name == "head.weight" and at_once):
                tape.mark(block, GRADIENTS)
            sharding.kept.append(block)

    ops = SETS[row.operations](tape, graph, weigh, around.late)
    ops.marked = around.first and at_once and "head.weight" not in around.root
    return tape, graph, sharding, ops


def _backward(
    around: Around,
    ops: Operations,
    sharding: Sharding,
    made: list[Value],
    size: int,
    held: list[Any],
    *,
    streams_only: bool = False,
) -> Pass:
    tape = ops.tape
    forward = tape.cut()
    tape.forward = False
    sharding.left_gather = None
    held.append(made[0].block)  # it goes with the element behind, whose input it is
    gradient = [tape.new(size)]
    if around.holds_gradient:
        held.append(gradient[0])
    if around.hooked:
        if around.behind is not None:
            sharding.left_reduce += [tape.new(group.whole, COMMUNICATION) for group in around.behind.groups]
        first = len(around.unit.groups) - around.asked
        asked = enumerate(around.unit.groups[first:], first)
        sharding.ready["block"] = {i: tape.new(group.buffer, COMMUNICATION) for i, group in asked}
    tape.cut()
    alone = around.hooked and streams_only  # the head's hooks are inside of its graph
    if alone:
        sharding.before_backward("block")
    result = ops.graph.backward(made.pop(), gradient.pop())
    if alone:
        sharding.after_backward("block")
    backward = tape.cut()
    ops.finish()
    weights = tape.cut()
    del result
    return Pass(forward, backward, weights)
