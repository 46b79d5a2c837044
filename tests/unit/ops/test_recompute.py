"""Keeping recipes changes what is held between forward and backward, and not one bit of a gradient."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4 import block
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops.recompute import keep, offer, recipes
from fullweight.ops.reference import ReferenceOperations


def gradients(ops: ReferenceOperations, dtype: torch.dtype) -> dict[str, Tensor]:
    config = DeepSeekV4Config.preset("tiny")
    model = initialise(DeepSeekV4(config, dtype, ops=ops), 0)
    lengths = [129, 1, 5, 40]
    tokens = torch.randint(0, config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, torch.ones(len(tokens)), PackedLayout.build(lengths, config.ratios))
    sum(model(batch).losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On two, torch's own scatters, which the reference uses, add in an order that varies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(
    ops: ReferenceOperations, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recipes = gradients(ops, dtype)

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    monkeypatch.setattr(block, "recipes", nothing)
    without = gradients(ops, dtype)
    assert with_recipes.keys() == without.keys()
    for name, gradient in with_recipes.items():
        assert torch.equal(gradient, without[name]), name


def test_a_recipe_of_a_recipe_keeps_the_first_input_only() -> None:
    """x -> a = 2x -> b = sin(a) -> b * w: backward of the product needs b, which nothing holds."""
    x, w = torch.randn(5), torch.randn(5, requires_grad=True)
    calls: list[str] = []

    def double(t: Tensor) -> Tensor:
        calls.append("double")
        return 2 * t

    def sine(t: Tensor) -> Tensor:
        calls.append("sine")
        return torch.sin(t)

    with recipes():
        a = keep(double, x)
        b = keep(sine, a)
        y = (b * w).sum()
    held = weakref.ref(a), weakref.ref(b)
    del a, b
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    y.backward()
    assert torch.equal(w.grad, torch.sin(2 * x))  # type: ignore[arg-type]
    assert calls == ["double", "sine", "double", "sine"]


def test_a_norm_holds_nothing_that_can_be_made_again(ops: ReferenceOperations) -> None:
    """A sublayer's input before its norm: neither it nor any view of it is there between forward and backward."""
    x, weight = torch.randn(8, 16), torch.randn(16, requires_grad=True)
    with recipes():
        taken = keep(torch.sin, x)
        held = weakref.ref(taken.untyped_storage())
        y = ops.rms_norm(taken, weight, 1e-6)
    del taken
    gc.collect()
    assert held() is None
    y.sum().backward()
    wide = torch.sin(x).double()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum(0)
    torch.testing.assert_close(weight.grad, expected.float())


def test_an_offer_does_not_run_its_function() -> None:
    w = torch.randn(3, requires_grad=True)
    b = torch.ones(3)

    def remake(t: Tensor) -> Tensor:
        return t + 1

    with recipes():
        offer(b, remake, torch.zeros(3))
        y = (b * w).sum()
    y.backward()
    assert torch.equal(w.grad, torch.ones(3))  # type: ignore[arg-type]


def test_without_gradients_nothing_is_written_down() -> None:
    with torch.no_grad(), recipes():
        assert torch.equal(keep(torch.sin, torch.ones(2)), torch.sin(torch.ones(2)))
