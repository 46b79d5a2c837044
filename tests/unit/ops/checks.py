"""What the contract tests share: a ragged row, random tensors, and the comparison with a float64 formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fullweight.core.types import PackedLayout

# Documents of one token, of sizes on both sides of every window and of the chunks that implementations work in,
# and padding.
LENGTHS = (1, 5, 261, 3, 4, 40, 133)
NUM_TOKENS = 480
LAYOUT = PackedLayout.build(LENGTHS, (4, 128), NUM_TOKENS)

# Relative norm of the error of values and of gradients. fp32 sums of a few hundred terms round to about 1e-6;
# bf16 keeps 8 bits, and a result or gradient passes a handful of such roundings (2^-9 each) that average out.
TOLERANCE = {torch.float32: (5e-6, 3e-5), torch.bfloat16: (1e-2, 2e-2)}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

Function = Callable[..., Tensor | Sequence[Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values fixed by shape and seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def check(operation: Function, formula: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Same values, and for a random cotangent of each differentiable output the same gradients."""
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found, expected = operation(*ours), formula(*exact)
    found = [found] if isinstance(found, Tensor) else list(found)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    value_tolerance, gradient_tolerance = TOLERANCE[dtype]
    cotangents = []
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert error(a, b) <= value_tolerance, f"output {index}: {error(a, b)}"
        cotangents.append(random(*b.shape, seed=99 + index).to(a.dtype))
    sum(((a * c).sum().float() for a, c in zip(found, cotangents, strict=True)), torch.zeros(())).backward()
    sum(((b * c.double()).sum() for b, c in zip(expected, cotangents, strict=True))).backward()
    for index, (x, y) in enumerate(zip(ours, exact, strict=True)):
        assert x.grad is not None, index
        assert x.grad.dtype == x.dtype
        assert error(x.grad, y.grad) <= gradient_tolerance, f"gradient {index}: {error(x.grad, y.grad)}"


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-12))


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [tokens, pairs] of a rotation, fp32."""
    turns = torch.arange(tokens).unsqueeze(1) * torch.logspace(0, -3, pairs)
    return turns.cos(), turns.sin()
