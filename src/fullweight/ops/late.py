"""Weight gradients for later: the products that nobody waits for, put off until there is nothing better to do.

The gradient of a layer's input is what the stage before it in a pipeline waits for; the gradient of its weight
is needed only by the optimiser. Inside `put_off()`, a product y = f(x, w) runs with a weight that autograd does
not see (`split`), its backward returns the input's gradient and leaves the weight's as a call in a queue, and
`WeightGradients.take` hands out the calls of one micro-batch. Each product is formed once, as in an ordinary
backward, from the same operands.

Why this way: autograd can also be asked for input gradients first and weight gradients afterwards, over a graph
that is kept. Functions that form both together, as the fused ones here do, would then run twice, and recomputed
blocks once for every group of weights.

Only matrix products are put off: projections and experts. Norms, hyper-connections, the embedding and the head
form their weight gradients at once. What a queued call holds is what its product needs: the layer's input and the
gradient of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class WeightGradients:
    """Products not yet formed: (weight as the layer used it, call that makes its gradient)."""

    pending: list[tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=list)

    def take(self) -> Callable[[], None]:
        """All that is pending, as one call that forms the gradients and adds them to the parameters'."""
        taken, self.pending = self.pending, []

        def run() -> None:
            while taken:
                weight, product = taken.pop(0)
                token = _forming.set(True)
                try:
                    gradient = product()
                finally:
                    _forming.reset(token)
                # a weight may be a part or a view of a parameter: autograd knows the way
                torch.autograd.backward(weight, gradient)

        return run


@dataclass(frozen=True)
class Late:
    """Where the gradient of a weight goes that an operation got without its graph."""

    weight: Tensor
    queue: WeightGradients

    def put(self, product: Callable[[], Tensor]) -> None:
        self.queue.pending.append((self.weight, product))


_open: ContextVar[WeightGradients | None] = ContextVar("open queue of weight gradients", default=None)
_forming: ContextVar[bool] = ContextVar("a product that was put off is being formed", default=False)


def forming() -> bool:
    """Whether a product that was put off runs now: part of a backward pass, though autograd runs none."""
    return _forming.get()


@contextmanager
def put_off(queue: WeightGradients) -> Iterator[None]:
    """The weight gradients of products that run inside go to `queue` when backward reaches them."""
    token = _open.set(queue)
    try:
        yield
    finally:
        _open.reset(token)


def split(x: Tensor, weight: Tensor) -> tuple[Tensor, Late | None]:
    """The weight for a product with x and where its gradient goes; (weight, None) when it is not late.

    An input without gradient leaves nothing to carry the backward pass to the product, so its weight stays.
    """
    queue = _open.get()
    if queue is None or not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
        return weight, None
    return weight.detach(), Late(weight, queue)
