"""Keep how a tensor was made instead of the tensor; or keep a whole part of the model's inputs alone.

Some results are cheap to make again from what autograd keeps anyway: a norm's output, a sublayer's input, the
streams between two sublayers, attention's queries. Inside `recipes()`, `keep(function, *inputs)` runs the
function and, wherever backward would keep its result, keeps the call instead; the first backward that needs
the result runs it again, and all share it. An input that has a recipe itself is kept as that recipe. This
costs a few element-wise passes and one small product a layer, and halves the activations.

`remade` is activation checkpointing, which repeats every product of a function: backward keeps its inputs and runs
it again. Recipes are off inside, because what they kept would be kept beside the inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Recipe:
    """A deterministic call whose one tensor can be had again."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor | Recipe, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        if self.result is None:
            with torch.no_grad():
                self.result = self.function(*(made(kept) for kept in self.inputs))
        return self.result


def made(kept: Tensor | Recipe) -> Tensor:
    return kept.make() if isinstance(kept, Recipe) else kept


class _Book:
    """The recipes of one block's forward pass."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], tuple[weakref.ref[Tensor], Recipe]] = {}  # by place in memory

    def find(self, tensor: Tensor) -> Tensor | Recipe:
        """The tensor's recipe, or the tensor without its graph, in which a saved output would hold itself."""
        reference, recipe = self.entries.get(_place(tensor), (None, None))
        # the reference is dead once the result is freed: its place may since belong to another tensor
        result = reference() if reference is not None else None
        if recipe is not None and result is not None and _same(result, tensor):
            return recipe
        return tensor.detach()


_open: ContextVar[_Book | None] = ContextVar("open book of recipes", default=None)
_off: ContextVar[bool] = ContextVar("recipes are off", default=False)


@contextmanager
def recipes() -> Iterator[None]:
    """Where gradients are on, let `keep` and `offer` replace what backward would keep."""
    if not torch.is_grad_enabled() or _off.get():
        yield
        return
    book = _Book()
    token = _open.set(book)
    try:
        with torch.autograd.graph.saved_tensors_hooks(book.find, made):
            yield
    finally:
        _open.reset(token)


def keep(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which is made again when backward needs it; must be deterministic."""
    result = function(*inputs)
    offer(result, function, *inputs)
    return result


def offer(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Say that function(*inputs) would make `result` again."""
    book = _open.get()
    if book is not None:
        recipe = Recipe(function, tuple(book.find(t) for t in inputs))
        book.entries[_place(result)] = weakref.ref(result), recipe


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins: its storage and the offset in it, which tensors without data have too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def remade(
    function: Callable[..., Tensor], *inputs: Any, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Tensor:
    """function(*inputs), which backward runs again, inside `again()`, from its inputs; must be deterministic.

    Draws no random numbers. Gradients are bit for bit those of a plain call.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    result = checkpoint(
        partial(_without_recipes, function),
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again()),
    )
    assert isinstance(result, Tensor)
    return result


def _without_recipes(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    off, book = _off.set(True), _open.set(None)
    try:
        return function(*inputs)
    finally:
        _open.reset(book)
        _off.reset(off)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors at one place are one."""
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
