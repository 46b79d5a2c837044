"""The rank test: merged adapters are named, full updates are not, and rounding does not decide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullweight.evidence import low_rank
from fullweight.evidence.low_rank import rank_test
from fullweight.optim.adamw import AdamWConfig, build_adamw
from fullweight.optim.muon import Muon, MuonConfig

SHAPES = [(64, 96), (256, 192), (512, 320)]  # exact, exact, randomised


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(shape: tuple[int, int], rank: int, size: float) -> Tensor:
    """A product of `rank` columns and rows, of Frobenius norm `size` times sqrt(elements)."""
    change = numbers(shape[0], rank, seed=1) @ numbers(rank, shape[1], seed=2)
    return change * (size * math.sqrt(change.numel()) / change.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_merged_adapter_is_named_with_its_rank(shape: tuple[int, int], size: float) -> None:
    """W + BA in fp32, changes of 0.5 % and half of W; every rank up to the limit."""
    before = 0.02 * numbers(*shape)
    for rank in (1, 8, low_rank.limit_of(*shape)):
        found = rank_test(before, before + adapter(shape, rank, size))
        assert found is not None
        assert found.rank == rank
        assert found.residual < 1e-3


def test_ranks_beyond_the_limit_are_full_ones() -> None:
    """Of 512 x 320 the limit is 64; an update of 80 directions is not called low."""
    before = 0.02 * numbers(512, 320)
    found = rank_test(before, before + adapter((512, 320), 80, 1e-2))
    assert found is not None
    assert found.rank is None
    assert found.residual > 0.1


def test_the_share_outside_is_that_of_the_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, by a fp64 SVD; from above by the range finder, which is asked for both here."""
    before, after = 0.02 * numbers(200, 256), 0.02 * numbers(200, 256, seed=3)
    change = after - before
    values = torch.linalg.svdvals(change.double())
    expected = (values[64:].square().sum() / values.square().sum()).sqrt().item()
    assert low_rank._tails(change, 64, "x")[64] == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 100)
    assert expected * (1 - 1e-5) <= low_rank._tails(change, 64, "x")[64] <= expected * 1.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decay_does_not_hide_an_adapter(shape: tuple[int, int]) -> None:
    """The weights are scaled by 0.9, a change of full rank as large as the adapter of rank 4 that is added."""
    before = 0.02 * numbers(*shape)
    found = rank_test(before, 0.9 * before + adapter(shape, 4, 2e-3))
    assert found is not None
    assert found.rank == 4


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_updates_by_the_optimisers_are_full(optimizer: str) -> None:
    """Few steps on gradients of 24 tokens each: Muon's and AdamW's updates are not of low rank."""
    before = 0.02 * numbers(96, 64)
    weight = torch.nn.Parameter(before.clone())
    groups = [{"params": [weight], "weight_decay": 0.1}]
    rule = build_adamw(groups, AdamWConfig(), 1e-3) if optimizer == "adamw" else Muon(groups, MuonConfig(), 1e-3)
    for step in range(6):
        weight.grad = numbers(96, 24, seed=10 + step) @ numbers(24, 64, seed=20 + step)
        rule.step()
    found = rank_test(before, weight.detach())
    assert found is not None
    assert found.rank is None
    assert found.residual > 0.1


def test_what_cannot_be_judged_is_not() -> None:
    """No change, a vector, few rows, and a change that rounding to fp32 blurs."""
    before = 0.02 * numbers(64, 64)
    blurred = before + adapter((64, 64), 2, 1e-9)
    assert not torch.equal(before, blurred)
    assert rank_test(before, before) is None
    assert rank_test(before, blurred) is None
    assert rank_test(before[0], before[1]) is None
    assert rank_test(before[:24], -before[:24] + 1) is None
