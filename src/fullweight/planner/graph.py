"""A backward pass over sizes: which operation keeps what, and in which order what is given back.

The rules are torch's and the model's own, in a few lines each: a node keeps blocks until it has run; nodes run
latest first; gradients of one value are added up; an output that is cheap to make again is kept as the
call that makes it (`ops/recompute.py`), and a part of the model may keep its inputs alone and run again. Nothing
is computed: a value is a block of `tape.py` and the node that made it. Imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fullweight.planner.tape import Block, Tape

Gradients = Sequence[Block | None]


@dataclass(eq=False)
class Recipe:
    """A call whose block can be had again."""

    function: Callable[..., Block]
    inputs: tuple[Any, ...]
    result: Block | None = None

    def make(self) -> Block:
        if self.result is None:
            self.result = self.function(*[made(kept) for kept in self.inputs])
        return self.result


def made(kept: Any) -> Any:
    return kept.make() if isinstance(kept, Recipe) else kept


@dataclass(eq=False)
class Node:
    """One operation: its backward takes gradients of its outputs and what was kept, and gives the inputs'."""

    number: int
    backward: Callable[..., Gradients]
    edges: tuple[tuple[Node, int] | None, ...]
    num_outputs: int
    saved: list[Any] = field(default_factory=list)  # what hooks of saved tensors see
    own: tuple[Any, ...] = ()  # what it keeps past all hooks
    keeps: bool = False  # anything that hooks see: what makes a part run again


@dataclass(eq=False)
class Value:
    """A block, and where it comes from."""

    block: Block
    source: tuple[Node, int] | None = None
    recipe: Recipe | None = None

    def detached(self) -> Value:
        """The same without its graph."""
        return Value(self.block, None, self.recipe)


@dataclass(eq=False)
class Frame:
    """A part that is run again in backward, when the first of its nodes needs what it kept."""

    function: Callable[..., Value]
    inputs: tuple[Value, ...]
    nodes: list[Node] = field(default_factory=list)
    ready: bool = False


class _EnoughError(Exception):
    """All that a part's nodes keep has been made again: torch's checkpoint runs no further."""


class Graph:
    """Operations in order of their making. `recipes` says whether cheap outputs are kept as calls."""

    def __init__(self, tape: Tape, recipes: bool = True) -> None:
        self.tape, self.recipes = tape, recipes
        self.count = 0
        self.outlives: list[Any] | None = None  # what nodes own is left there when they have run
        self.book: list[Recipe] = []  # of the block that is run: the nodes that keep anything keep all of it
        self.frame: Frame | None = None  # inside a part that is run again
        self.record: list[Node] | None = None  # while it is run again
        self.enough = 0  # nodes of the record, up to the last that keeps anything

    def node(
        self,
        backward: Callable[..., Gradients],
        inputs: Sequence[Value | None],
        blocks: Sequence[Block],
        saved: Sequence[Value | Block | list[Block] | None] = (),
        own: tuple[Any, ...] = (),
    ) -> list[Value]:
        """An operation's outputs. Of `saved`, a value that has a recipe is kept as that; of what is in a list
        backward lets go on its way."""
        self.count += 1
        edges = tuple([v.source if v is not None else None for v in inputs])
        node = Node(self.count, backward, edges, len(blocks), [], own, bool(saved))
        kept = [self._kept(item) for item in saved]
        if self.record is not None:
            self.record.append(Node(0, backward, (), 0, kept))
            if len(self.record) == self.enough:
                raise _EnoughError
        elif self.frame is not None:
            self.frame.nodes.append(node)
            node.own = (*own, self.frame)
        if self._plain:
            node.saved = kept
            if saved and self.recipes:
                node.own = (*own, self.book)
        return [Value(block, (node, i)) for i, block in enumerate(blocks)]

    def _kept(self, item: Value | Block | list[Block] | None) -> Any:
        if isinstance(item, Value):
            return item.recipe if item.recipe is not None and self.recipes and self._plain else item.block
        return item

    @property
    def _plain(self) -> bool:
        return self.frame is None and self.record is None

    def keep(self, value: Value, function: Callable[..., Block], *inputs: Value) -> Value:
        """Say that the function would make the value again."""
        if self.recipes and self._plain:
            value.recipe = Recipe(function, tuple([self._kept(v) for v in inputs]))
            self.book.append(value.recipe)
        return value

    def remade(self, function: Callable[..., Value], *inputs: Value) -> Value:
        """function(*inputs), which keeps its inputs alone and runs again in backward."""
        self.frame = Frame(function, tuple([Value(self._kept(v), v.source) for v in inputs]))
        result = function(*[Value(v.block, v.source) for v in inputs])
        self.frame = None
        return result

    def _again(self, frame: Frame) -> None:
        """Run the part of the frame again, for what its nodes should have kept."""
        self.record = []
        self.enough = 1 + max(i for i, node in enumerate(frame.nodes) if node.keeps)
        with suppress(_EnoughError):
            frame.function(*[Value(made(v.block), v.source) for v in frame.inputs])
        found, self.record = self.record, None
        for mine, made_again in zip(frame.nodes, found, strict=False):  # the rest keep nothing
            mine.saved = made_again.saved
        frame.nodes, frame.ready = [], True

    def backward(self, value: Value, gradient: Block | None) -> Block | None:
        """Run it from one value; returns the gradient that reaches the value without a source (the input)."""
        assert value.source is not None
        self.book = []
        root = value.source[0]
        needs: dict[int, int] = {}
        seen, stack = {root.number}, [root]
        while stack:
            for edge in stack.pop().edges:
                if edge is not None:
                    needs[edge[0].number] = needs.get(edge[0].number, 0) + 1
                    if edge[0].number not in seen:
                        seen.add(edge[0].number)
                        stack.append(edge[0])
        del stack
        buffers: dict[int, list[Block | None]] = {root.number: [None] * root.num_outputs}
        buffers[root.number][value.source[1]] = gradient
        del gradient
        ready: list[tuple[int, Node]] = [(-root.number, root)]
        value.source = None
        del root, value
        last: Block | None = None
        while ready:
            node = heapq.heappop(ready)[1]
            given = self._run(node, buffers.pop(node.number))
            edges = node.edges
            if self.outlives is not None:
                self.outlives += [item for item in node.own if not isinstance(item, (Frame, list))]
            node.saved, node.own, node.edges = [], (), ()
            results = list(given)
            del given, node
            for edge in edges:
                result = results.pop(0)
                if edge is None:
                    last = result if result is not None else last
                    del result
                    continue
                target, place = edge
                buffer = buffers.setdefault(target.number, [None] * target.num_outputs)
                if buffer[place] is None:
                    buffer[place] = result
                elif result is not None:
                    # torch adds in place but while operations are watched, and a rehearsal's are
                    result = self.tape.new(result.num_bytes)
                    buffer[place] = result
                needs[target.number] -= 1
                if not needs[target.number]:
                    heapq.heappush(ready, (-target.number, target))
                del result, buffer
            del edges, results
        return last

    def _run(self, node: Node, gradients: list[Block | None]) -> Gradients:
        frame = node.own[-1] if node.own and isinstance(node.own[-1], Frame) else None
        if frame is not None and not frame.ready and node.keeps:
            self._again(frame)
        saved, node.saved = [made(kept) for kept in node.saved], node.saved
        return node.backward(gradients, saved)
