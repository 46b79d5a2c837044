"""Muon against float64 singular value decompositions and its own formula worked out independently."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

from fullweight.optim import muon
from fullweight.optim.muon import Muon, MuonConfig, newton_schulz

FLOAT32 = MuonConfig(ns_dtype="float32")
SHAPES = [(64, 64), (24, 200), (200, 24), (1, 50), (50, 1), (1, 1), (3, 7)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(start: Tensor, gradients: list[Tensor], config: MuonConfig = FLOAT32, **group: object) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [weight], **group}], config, learning_rate=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def polar_by_steps(matrix: Tensor) -> Tensor:
    """U p(S) V^T in float64: the scalar iteration applied to the singular values of an SVD."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(8):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for _ in range(2):
        s = 2.0 * s - 1.5 * s**3 + 0.5 * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_near_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular values within 0.98 to 1.02 (fp32; bf16 rounds to 2^-8, so 0.97 to 1.03), direction U V^T.

    The band is for singular values above about 1e-3 of the norm; the smallest of a random square matrix of
    64 lies lower now and then, so that case lifts them.
    """
    matrix = random(*shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    matrix = ((u * s.clamp_min(0.05 * s.max())) @ vh).float()
    result = newton_schulz(matrix[None], dtype)[0].double()
    values = torch.linalg.svdvals(result)
    slack = 0.02 if dtype == torch.float32 else 0.03
    assert values.min() > 1 - slack
    assert values.max() < 1 + slack
    assert (result - u @ vh).norm() / math.sqrt(min(shape)) < slack


@pytest.mark.parametrize("shape", SHAPES)
def test_update_is_the_published_formula(shape: tuple[int, int]) -> None:
    """Three steps in fp32 equal the formula evaluated in float64 through an SVD."""
    start, gradients = random(*shape), [random(*shape, seed=s) for s in (1, 2, 3)]
    weight, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient.double()
        update = polar_by_steps(0.95 * momentum + gradient.double()) * math.sqrt(max(shape)) * 0.18
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * update
    result = stepped(start, gradients, weight_decay=0.2)
    # fp32 rounding through ten steps that amplify small singular values up to 3.4445 times each.
    torch.testing.assert_close(result.double(), weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 96), (32, 160), (160, 32)])
def test_update_rms_is_gamma(shape: tuple[int, int], ns_dtype: str) -> None:
    """RMS 0.18 per unit of learning rate for a random full-rank gradient, whatever its scale or shape."""
    for scale in (1e-25, 1.0, 1e25):
        config = MuonConfig.resolve({"ns_dtype": ns_dtype})
        moved = stepped(torch.zeros(shape), [random(*shape) * scale], config) / 0.1
        assert moved.square().mean().sqrt().item() == pytest.approx(0.18, rel=0.03)


def test_stacked_matrices_are_independent() -> None:
    """Changing expert 3's gradient changes only expert 3, and each expert equals its own separate Muon."""
    start, gradient = random(5, 8, 12), random(5, 8, 12, seed=1)
    other = gradient.clone()
    other[3] = random(8, 12, seed=2)
    base, changed = stepped(start, [gradient], num_matrices=5), stepped(start, [other], num_matrices=5)
    same = [torch.equal(base[e], changed[e]) for e in range(5)]
    assert same == [True, True, True, False, True]
    for expert in range(5):
        torch.testing.assert_close(base[expert], stepped(start[expert], [gradient[expert]]), rtol=0, atol=1e-6)


def test_halves_of_one_parameter_are_separate_matrices() -> None:
    """num_matrices cuts rows: [E, 2f, d] with 2E matrices, and [g r, c] with g."""
    start, gradient = random(3, 8, 6), random(3, 8, 6, seed=1)
    result = stepped(start, [gradient], num_matrices=6)
    alone = stepped(start[1, 4:], [gradient[1, 4:]])
    torch.testing.assert_close(result[1, 4:], alone, rtol=0, atol=1e-6)
    flat = stepped(start.view(24, 6), [gradient.view(24, 6)], num_matrices=6)
    assert torch.equal(flat, result.view(24, 6))


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
def test_expert_without_tokens_gets_only_weight_decay(ns_dtype: str) -> None:
    """Zero gradient and momentum, or nothing but subnormal dust: no NaN, no update but decay."""
    start, gradient = random(4, 6, 10), random(4, 6, 10, seed=1)
    gradient[1], gradient[2] = 0.0, 1e-40
    config = MuonConfig.resolve({"ns_dtype": ns_dtype})
    result = stepped(start, [gradient, gradient], config, num_matrices=4, weight_decay=0.5)
    assert result.isfinite().all()
    torch.testing.assert_close(result[1:3], start[1:3] * 0.95 * 0.95)
    assert not torch.allclose(result[0], start[0] * 0.95 * 0.95)


def test_momentum_outlives_a_zero_gradient() -> None:
    """An expert reached in one step and not in the next still moves along its momentum."""
    gradient = random(6, 10)
    once, twice = (
        stepped(torch.zeros(6, 10), [gradient]),
        stepped(torch.zeros(6, 10), [gradient, torch.zeros(6, 10)]),
    )
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


def test_non_finite_gradient_is_not_hidden() -> None:
    """A NaN that slips past the guards shows in its own matrix, not in its neighbours."""
    gradient = random(3, 4, 5)
    gradient[1, 0, 0] = math.nan
    result = stepped(torch.zeros(3, 4, 5), [gradient], num_matrices=3)
    assert result[1].isnan().any()
    assert result[[0, 2]].isfinite().all()


def test_chunks_and_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of several shapes, processed three matrices or one at a time, give what one batch gives."""
    starts = [random(7, 8, 12), random(8, 12), random(12, 8), random(2, 8, 12), random(9, 40)]

    def run() -> list[Tensor]:
        weights = [nn.Parameter(s.clone()) for s in starts]
        groups = [{"params": [w], "num_matrices": w.shape[0] if w.dim() == 3 else 1} for w in weights]
        optimizer = Muon(groups, FLOAT32, 0.1)
        for i, weight in enumerate(weights):
            weight.grad = random(*weight.shape, seed=i)
        optimizer.step()
        return [w.detach() for w in weights]

    whole = run()
    for entries in (3 * 96, 1):
        monkeypatch.setattr(muon, "CHUNK_ENTRIES", entries)
        for a, b in zip(whole, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradients_that_are_views_or_absent() -> None:
    """Non-contiguous gradients are read right; a parameter without one keeps its bits and has no state."""
    start, gradient = random(6, 10), random(10, 6, seed=1)
    assert torch.equal(stepped(start, [gradient.T]), stepped(start, [gradient.T.contiguous()]))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [weight], "weight_decay": 0.5}], FLOAT32, 0.1)
    optimizer.step()
    assert torch.equal(weight, start)
    assert not optimizer.state


def test_zero_learning_rate_moves_nothing_but_momentum() -> None:
    """The step a checkpoint loader takes to create the state."""
    weight = nn.Parameter(random(6, 10))
    optimizer = Muon([{"params": [weight], "weight_decay": 0.5}], FLOAT32, 0.0)
    before, weight.grad = weight.detach().clone(), random(6, 10, seed=1)
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["momentum"], weight.grad)


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
def test_resume_is_exact(ns_dtype: str) -> None:
    """State saved to bytes after two steps and loaded into a new optimiser continues bit for bit."""
    config = MuonConfig.resolve({"ns_dtype": ns_dtype})

    def advance(weight: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            weight.grad = random(4, 6, 10, seed=step)
            optimizer.step()

    def build(start: Tensor) -> tuple[nn.Parameter, Muon]:
        weight = nn.Parameter(start.clone())
        return weight, Muon([{"params": [weight], "num_matrices": 4, "weight_decay": 0.1}], config, 0.1)

    straight, optimizer = build(random(4, 6, 10))
    advance(straight, optimizer, range(2))
    saved = io.BytesIO()
    torch.save({"weight": straight.detach(), "optimizer": optimizer.state_dict()}, saved)
    advance(straight, optimizer, range(2, 5))
    loaded = torch.load(io.BytesIO(saved.getvalue()))
    resumed, fresh = build(loaded["weight"])
    fresh.load_state_dict(loaded["optimizer"])
    assert fresh.state[resumed]["momentum"].dtype == torch.float32
    advance(resumed, fresh, range(2, 5))
    assert torch.equal(straight, resumed)
