"""Weight gradients that were put off are those of an ordinary backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fullweight.ops.late import WeightGradients, put_off
from fullweight.ops.reference import ReferenceOperations

from .checks import random

SHAPES = {"linear": (24, 16), "wide": (8, 24), "grouped": (12, 8), "gate_up": (4, 24, 12), "down": (4, 12, 12)}


def weights() -> dict[str, Tensor]:
    return {name: random(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(SHAPES.items())}


def run(ops: ReferenceOperations, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    hidden = ops.linear(x, weights["linear"])
    logits = ops.wide_linear(hidden, weights["wide"])
    grouped = ops.grouped_linear(hidden.view(-1, 3, 8), weights["grouped"])
    scores, chosen = logits[:, :4].softmax(-1).topk(2, -1)
    mixed = ops.experts(grouped, chosen, scores, weights["gate_up"], weights["down"], 10.0)
    return (mixed.square().sum() + logits.sum()).float()


def test_put_off_gradients_are_the_ordinary_ones(ops: ReferenceOperations) -> None:
    """Two micro-batches; the first one's products are formed after the second one's backward pass."""
    ordinary, late = weights(), weights()
    inputs = [random(40, 16, seed=7 + i).requires_grad_() for i in range(2)]
    expected = []
    for x in inputs:
        run(ops, x, ordinary).backward()
        expected.append(x.grad)
        x.grad = None
    queue, calls = WeightGradients(), []
    for x in inputs:
        with put_off(queue):
            loss = run(ops, x, late)
        loss.backward()
        calls.append(queue.take())
    for x, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-6)
    assert all(weight.grad is None for weight in late.values())
    for call in calls:
        call()
    for name, weight in ordinary.items():
        torch.testing.assert_close(late[name].grad, weight.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert not queue.pending


def test_a_weight_whose_input_carries_no_gradient_is_not_put_off(ops: ReferenceOperations) -> None:
    """Nothing but the weight would bring backward to such a product."""
    weight = random(8, 16).requires_grad_()
    queue = WeightGradients()
    with put_off(queue):
        out = ops.linear(random(5, 16), weight)
    out.sum().backward()
    assert weight.grad is not None
    assert not queue.pending


def test_the_gradient_of_a_part_reaches_its_parameter(ops: ReferenceOperations) -> None:
    """A layer may use some rows of a parameter, as ranks that share heads do."""
    parameter, x = random(8, 16).requires_grad_(), random(5, 16).requires_grad_()
    queue = WeightGradients()
    with put_off(queue):
        out = ops.linear(x, parameter[2:6])
    out.sum().backward()
    queue.take()()
    expected = torch.zeros(8, 16)
    expected[2:6] = x.detach().sum(0)
    torch.testing.assert_close(parameter.grad, expected)
