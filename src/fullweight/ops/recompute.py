"""Keep how a tensor was made instead of the tensor.

Some results are cheap to make again from inputs that autograd keeps anyway: a norm's output, the streams between
two sublayers. Inside `keep_recipes()`, `keep(function, *inputs)` runs the function and, wherever backward would
keep its result, keeps the call instead; the first backward that needs the result runs it again, and all share it.
This costs a few element-wise passes and saves a third of the activations; full activation checkpointing, by
contrast, repeats the matrix products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Recipe:
    """A call whose result can be had again."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, tuple(t.detach() for t in inputs)
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        if self.result is None:
            with torch.no_grad():
                self.result = self.function(*self.inputs)
        return self.result


@contextmanager
def keep_recipes() -> Iterator[Callable[..., Tensor]]:
    """Yields `keep(function, *inputs) -> Tensor`; the function must be deterministic and its result one tensor."""
    recipes: list[tuple[weakref.ref[Tensor], _Recipe]] = []
    grad = torch.is_grad_enabled()

    def keep(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        result = function(*inputs)
        if grad:
            recipes.append((weakref.ref(result), _Recipe(function, inputs)))
        return result

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        for reference, recipe in recipes:
            result = reference()  # dead once freed: its address may since belong to another tensor
            if result is not None and _same(result, tensor):
                return recipe
        return tensor.detach()  # a saved output would otherwise hold the node that holds it

    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.make() if isinstance(kept, _Recipe) else kept

    if not grad:
        yield keep
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield keep


def _same(a: Tensor, b: Tensor) -> bool:
    layout = (a.data_ptr(), a.dtype, a.shape, a.stride())
    return layout == (b.data_ptr(), b.dtype, b.shape, b.stride())
