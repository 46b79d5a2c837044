"""Gradient clipping on plain tensors; the sharded case is in tests/multi."""

import math

import pytest
import torch
from torch import Tensor

from fullweight.optim.clip import clip_grad_norm


def with_gradients(*gradients: Tensor | None) -> list[Tensor]:
    parameters = []
    for gradient in gradients:
        parameter = torch.zeros(3 if gradient is None else gradient.shape, requires_grad=True)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def test_scales_to_the_bound_by_hand() -> None:
    """Gradients (3, 0) and (4) have norm 5; clipped to 1 they become (0.6, 0) and (0.8)."""
    parameters = with_gradients(torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]))
    norm = clip_grad_norm(parameters, 1.0)
    assert (norm.item(), norm.dtype, norm.shape) == (5.0, torch.float32, ())
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[2].grad, torch.tensor([[0.8]]))


def test_below_the_bound_nothing_changes() -> None:
    """A norm at or under the bound leaves the gradients bit for bit."""
    gradient = torch.tensor([3.0, 4.0])
    parameters = with_gradients(gradient.clone())
    clip_grad_norm(parameters, 5.0)
    assert torch.equal(parameters[0].grad, gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_norm_scales_nothing(bad: float) -> None:
    """The guard sees the norm and the gradients as they came."""
    parameters = with_gradients(torch.tensor([1e3, bad]), torch.tensor([1e4]))
    assert not clip_grad_norm(parameters, 1.0).isfinite()
    assert parameters[0].grad[0] == 1e3
    assert parameters[1].grad.item() == 1e4


def test_no_gradient_at_all_is_norm_zero() -> None:
    """Nothing to clip is not an error."""
    assert clip_grad_norm(with_gradients(None, None), 1.0).item() == 0.0
    assert clip_grad_norm(with_gradients(torch.zeros(4), torch.zeros(0, 3)), 1.0).item() == 0.0


def test_norm_of_many_entries_matches_float64() -> None:
    """fp32 accumulation over millions of entries, and bf16 gradients, stay within 1e-6 of float64."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3001, 1001, generator=generator), torch.randn(7, 11, generator=generator) * 100]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert clip_grad_norm(with_gradients(*gradients), 1e9).item() == pytest.approx(exact, rel=1e-6)
    half = torch.full((100_000,), 0.5, dtype=torch.bfloat16)
    parameter = torch.zeros(100_000, dtype=torch.bfloat16, requires_grad=True)
    parameter.grad = half
    assert clip_grad_norm([parameter], 1e9).item() == pytest.approx(0.5 * math.sqrt(100_000), rel=1e-6)
