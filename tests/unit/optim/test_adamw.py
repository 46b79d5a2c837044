"""AdamW as configured, against the formula worked out by hand and in exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from fullweight.core.errors import ConfigError
from fullweight.optim.adamw import AdamWConfig, build_adamw


def test_three_steps_by_hand() -> None:
    """One weight, gradients 1, -2, 0.5: moments in exact fractions, the root in float64."""
    lr, decay = 0.1, 0.1
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_adamw([{"params": [weight], "weight_decay": decay}], AdamWConfig(), lr)
    expected, m, v = 1.0, Fraction(0), Fraction(0)
    for step, gradient in enumerate([Fraction(1), Fraction(-2), Fraction(1, 2)], start=1):
        weight.grad = torch.tensor([float(gradient)])
        optimizer.step()
        m = Fraction(9, 10) * m + Fraction(1, 10) * gradient
        v = Fraction(95, 100) * v + Fraction(5, 100) * gradient**2
        m_hat, v_hat = m / (1 - Fraction(9, 10) ** step), v / (1 - Fraction(95, 100) ** step)
        expected = expected * (1 - lr * decay) - lr * float(m_hat) / math.sqrt(v_hat)
        assert weight.item() == pytest.approx(expected, rel=2e-6)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32


def test_entries_without_gradient_stay_finite_and_still() -> None:
    """eps 1e-20 with a zero second moment: 0 / 1e-20 is 0; tiny gradients, squared to zero, stay finite."""
    weight = torch.nn.Parameter(torch.ones(40))
    optimizer = build_adamw([{"params": [weight], "weight_decay": 0.0}], AdamWConfig(), 0.1)
    for _ in range(3):
        weight.grad = torch.zeros(40)
        weight.grad[7], weight.grad[8] = 1e-24, 2.0
        optimizer.step()
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[[7, 8]] = False
    assert torch.equal(weight[untouched], torch.ones(38))
    assert weight.isfinite().all()
    assert weight[8].item() == pytest.approx(0.7, rel=1e-5)


def test_repeated_runs_give_the_same_bits() -> None:
    """The fused kernel is deterministic, odd sizes and several tensors included."""

    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (1, 17, 65_537)]
        optimizer = build_adamw([{"params": weights, "weight_decay": 0.1}], AdamWConfig(), 1e-3)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        return [w.detach() for w in weights]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_eps_that_is_zero_in_fp32_is_refused() -> None:
    """An eps that vanishes in fp32 would divide zero by zero."""
    with pytest.raises(ConfigError, match="eps"):
        AdamWConfig.resolve({"eps": 1e-50})
