"""The tools of all operations, and the exchanges of `parallel/`: what is common to every device.

Each function has the name of the operation it stands for and the same order of births; what is not dead after it
is what the real one keeps. Small things that do not grow with tokens or weights are left out. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.planner.graph import Graph, Value
from fullweight.planner.tape import GRADIENTS, Block, Tape

FP32, BF16, INT64, INT32 = 4, 2, 8, 4

Back = tuple[Block | None, ...]


def up(value: int, step: int) -> int:
    """The next multiple."""
    return -(-value // step) * step


@dataclass
class Base:
    """The operations of one pass. Sizes of activations are for `BF16` numbers unless they say otherwise.

    `weigh(name, block)` takes a weight's gradient; with `late`, products of weights are put off until `finish`.
    """

    tape: Tape
    graph: Graph
    weigh: Callable[[str, Block], None]
    late: bool = False
    pending: list[Callable[[], None]] = field(default_factory=list)
    marked: bool = False  # the head's gradient that the optimiser gets is marked from its birth
    head_parts: int = 1  # in how many parts a loss gives the head's gradient

    head_in_forward: ClassVar[bool] = True  # the head's gradient is formed beside the loss

    @classmethod
    def kept_more(cls, config: DeepSeekV4Config, kind: LayerKind, row_tokens: int) -> int:
        """Bytes that a layer keeps of a token beside what a CPU's operations do, for a quick look."""
        return 0

    def new(self, num_bytes: float) -> Block:
        return self.tape.new(num_bytes)

    def finish(self) -> None:
        """Form the weight gradients that were put off."""
        while self.pending:
            self.pending.pop(0)()

    def _later(self, product: Callable[[], None]) -> None:
        if self.late:
            self.pending.append(product)
        else:
            product()

    def plain(self, num_bytes: int, *inputs: Value, saved: Sequence[Value] = ()) -> Value:
        """An element-wise operation whose gradients are as large as its output and pass on to every input."""
        out = self.new(num_bytes)
        count = len(inputs)
        backward = lambda g, s: (g[0],) * count  # noqa: E731
        return self.graph.node(backward, list(inputs), [out], list(saved))[0]

    # ---- exchanges ----------------------------------------------------------------------------------

    def exchange(self, x: Value, sent: int, received: int) -> Value:
        """Bytes to other ranks for bytes from them."""
        out = self.new(received)
        self.tape.sent(x.block, out)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            back = self.new(sent)
            self.tape.sent(gradients[0], back)
            return (back,)

        return self.graph.node(backward, [x], [out])[0]

    def gather(self, x: Value, num_bytes: int, ranks: int, size: int = BF16) -> Value:
        """All ranks' rows; the gradient is the sum of all ranks'."""
        out = self.new(num_bytes * ranks)
        self.tape.sent(x.block, out)
        return self.graph.node(lambda g, s: (self.summed(g[0], num_bytes, ranks, size),), [x], [out])[0]

    def scatter_sum(self, x: Value, num_bytes: int, ranks: int, size: int = BF16) -> Value:
        """This rank's part, of `num_bytes`, of a sum over ranks."""
        out = self.summed(x.block, num_bytes, ranks, size)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            back = self.new(num_bytes * ranks)
            self.tape.sent(gradients[0], back)
            return (back,)

        return self.graph.node(backward, [x], [out])[0]

    def summed(self, block: Block, num_bytes: int, ranks: int, size: int) -> Block:
        """Everybody's part of everybody's rows, added up in fp32."""
        parts = self.new(num_bytes * ranks)
        self.tape.sent(block, parts)
        wide = self.new(num_bytes * FP32 // size)
        if size == FP32:
            return wide
        return self.new(num_bytes)

    # ---- the end ------------------------------------------------------------------------------------

    def loss(self, hidden: Value, dhidden: Block, dhead: Block) -> Value:
        """The loss, with the gradients that were formed beside it."""
        if self.marked:
            self.tape.mark(dhead, GRADIENTS)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            self.weigh("head.weight", saved[1])
            return (saved[0],)

        return self.graph.node(backward, [hidden], [self.new(4)], [dhidden, dhead])[0]
