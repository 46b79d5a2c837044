"""The compiled AdamW and norms against float64 formulas, against torch's own, and where they step aside."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fullweight.optim import update
from fullweight.optim.adamw import AdamW, AdamWConfig, build_adamw
from fullweight.optim.clip import clip_grad_norm, local_norms

SIZES = (1, 3, 127, 4097, 0, 16, 3 * 4096 + 5)
LR, DECAY, STEPS = 3e-3, 0.1, 5
BETA1, BETA2, EPS = 0.9, 0.95, 1e-20


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, and a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(update, "_library", lambda: None)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def gradients(step: int) -> list[Tensor]:
    """Of all sizes of numbers, zeros among them."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for size in SIZES:
        magnitude = 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
        found.append(torch.randn(size, generator=generator) * magnitude)
        found[-1][::7] = 0
    return found


def run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], scale: float, steps: int = STEPS
) -> None:
    """Steps over scaled gradients: AdamW scales them itself."""
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient if isinstance(optimizer, AdamW) else gradient * scale
        if isinstance(optimizer, AdamW):
            optimizer.gradient_scale = scale
        optimizer.step()


def ours(parameters: list[nn.Parameter]) -> AdamW:
    return build_adamw([{"params": parameters, "weight_decay": DECAY}], AdamWConfig(), LR)


def torchs(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, LR, (BETA1, BETA2), EPS, DECAY, fused=True)


def state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    kept = [optimizer.state[p] for p in parameters]
    return [t for p, s in zip(parameters, kept, strict=True) for t in (p.detach(), s["exp_avg"], s["exp_avg_sq"])]


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_adamw_follows_the_formula_in_float64(either: str, scale: float) -> None:
    """Moments and weights after five steps, sizes around blocks and vectors."""
    parameters = weights()
    optimizer = ours(parameters)
    expected = [
        (p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double()) for p in parameters
    ]
    run(optimizer, parameters, scale)
    for step in range(STEPS):
        for (w, m, v), gradient in zip(expected, gradients(step), strict=True):
            g = gradient.double() * scale
            m.mul_(BETA1).add_((1 - BETA1) * g)
            v.mul_(BETA2).add_((1 - BETA2) * g * g)
            hat_m, hat_v = m / (1 - BETA1 ** (step + 1)), v / (1 - BETA2 ** (step + 1))
            w.mul_(1 - LR * DECAY).sub_(LR * hat_m / (hat_v.sqrt() + EPS))
    for parameter, (w, m, v) in zip(parameters, expected, strict=True):
        kept = optimizer.state[parameter]
        assert kept["step"].item() == STEPS
        # a moment is a sum of terms of both signs: what it may lose is a share of the largest of them
        torch.testing.assert_close(kept["exp_avg"].double(), m, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(kept["exp_avg_sq"].double(), v, rtol=2e-6, atol=0)
        torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs_to_the_last_digits() -> None:
    """The same state by name, and values within a few units in the last place of torch's fused kernel."""
    mine, theirs = weights(), weights()
    one, other = ours(mine), torchs(theirs)
    run(one, mine, 0.37)
    run(other, theirs, 0.37)
    for p, q in zip(mine, theirs, strict=True):
        assert one.state[p].keys() == other.state[q].keys()
    for a, b in zip(state(one, mine), state(other, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_state_goes_to_torchs_adamw_and_back() -> None:
    """A state_dict of either continues in the other, with its moments and step."""
    straight, mine, theirs = weights(), weights(), weights()
    run(ours(straight), straight, 1.0)
    first, other = ours(mine), torchs(theirs)
    run(first, mine, 1.0, steps=2)
    other.load_state_dict(first.state_dict())
    again = ours(mine)
    again.load_state_dict(other.state_dict())
    for step in range(2, STEPS):
        for parameter, gradient in zip(mine, gradients(step), strict=True):
            parameter.grad = gradient
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, mine, strict=True))


def test_bits_do_not_depend_on_threads_or_neighbours(threads: None) -> None:
    """One thread, three, and each tensor by itself: the same weights and moments, and the same norms."""
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        parameters = weights()
        optimizer = ours(parameters)
        run(optimizer, parameters, 0.37)
        found.append([*state(optimizer, parameters), *local_norms(gradients(0))])
    alone = []
    for i in range(len(SIZES)):
        parameters = weights()
        optimizer = build_adamw([{"params": parameters[i : i + 1], "weight_decay": DECAY}], AdamWConfig(), LR)
        run(optimizer, parameters, 0.37)
        alone += state(optimizer, parameters[i : i + 1])
    norms = [norm for gradient in gradients(0) for norm in local_norms([gradient])]
    for other in (found[1], [*alone, *norms]):
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_parameters_that_seldom_have_a_gradient_count_their_own_steps(either: str) -> None:
    """One without gradient is untouched; one that joins later has its own bias correction."""
    parameters = [nn.Parameter(torch.ones(33)) for _ in range(3)]
    optimizer = build_adamw([{"params": parameters, "weight_decay": 0.0}], AdamWConfig(), 0.1)
    for step in range(3):
        parameters[0].grad = torch.ones(33)
        parameters[1].grad = torch.ones(33) if step == 2 else None
        optimizer.step()
    assert torch.allclose(parameters[0], torch.full((33,), 0.7))  # three steps of constant gradient, 0.1 each
    assert torch.allclose(parameters[1], torch.full((33,), 0.9))
    assert torch.equal(parameters[2], torch.ones(33))
    assert [optimizer.state[p]["step"].item() for p in parameters[:2]] == [3.0, 1.0]
    assert parameters[2] not in optimizer.state


def test_not_a_number_reaches_its_own_entry(either: str) -> None:
    """In a vector and in a remainder; no other entry is touched by it."""
    parameter = nn.Parameter(torch.ones(4097))
    optimizer = ours([parameter])
    parameter.grad = torch.ones(4097)
    parameter.grad[[5, 4096]] = math.nan
    optimizer.step()
    bad = parameter.isnan()
    assert bad.nonzero().flatten().tolist() == [5, 4096]
    assert optimizer.state[parameter]["exp_avg"].isnan().equal(bad)


@pytest.mark.parametrize("how", ["weight with gaps", "gradient with gaps", "float64"])
def test_what_the_kernel_does_not_take_goes_to_torch_or_is_copied(how: str) -> None:
    """Transposed weights, every second entry as gradient, other dtypes: the numbers of a plain tensor."""
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    slope = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    plain, odd = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    if how == "weight with gaps":
        odd = nn.Parameter(start.T.contiguous().T)
    if how == "float64":
        odd = nn.Parameter(start.double())
    for parameter in (plain, odd):
        optimizer = ours([parameter])
        parameter.grad = slope.to(parameter.dtype)
        if parameter is odd and how == "gradient with gaps":
            parameter.grad = torch.stack((slope, slope), -1)[..., 0]
        if parameter is odd and how == "weight with gaps":
            parameter.grad = torch.empty_strided(odd.shape, odd.stride()).copy_(slope)
        optimizer.gradient_scale = 0.5
        optimizer.step()
    torch.testing.assert_close(odd.detach().float(), plain.detach(), rtol=1e-5, atol=1e-6)


def test_a_graph_that_needs_the_old_weight_notices() -> None:
    """Autograd refuses to go back through a weight that a step has changed since."""
    parameter = nn.Parameter(torch.ones(40))
    optimizer = ours([parameter])
    loss = parameter.square().sum()
    parameter.grad = torch.ones(40)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_through_the_optimizer_is_clipping_in_place(either: str) -> None:
    """The same bits; gradients stay as they are; the next step below the bound is not scaled."""
    mine, theirs = weights(), weights()
    one, other = ours(mine), ours(theirs)
    for step, bound in [(0, 0.5), (1, 1e12), (2, 0.25)]:
        for parameters in (mine, theirs):
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
        norms = clip_grad_norm(mine, bound, optimizers=[one]), clip_grad_norm(theirs, bound)
        assert torch.equal(*norms)
        assert all(
            torch.equal(p.grad, g) for p, g in zip(mine, gradients(step), strict=True) if p.grad is not None
        )
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(state(one, mine), state(other, theirs), strict=True))


def test_a_refused_step_leaves_nothing_behind() -> None:
    """Clipped, then not taken, as the guard has it: weights and moments stay, the next step is not scaled."""
    mine, theirs = weights(), weights()
    one, other = ours(mine), ours(theirs)
    for parameter, gradient in zip(mine, gradients(0), strict=True):
        parameter.grad = gradient
    clip_grad_norm(mine, 0.5, optimizers=[one])
    assert not one.state
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    for parameters, optimizer in ((mine, one), (theirs, other)):
        for parameter, gradient in zip(parameters, gradients(1), strict=True):
            parameter.grad = gradient
        clip_grad_norm(parameters, 1e12, optimizers=[optimizer])
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_norms_of_very_large_and_very_small_entries() -> None:
    """Squares that fp32 cannot hold do not spoil a norm; not-a-number does, and only its own."""
    tensors = [torch.full((4097,), 1e30), torch.full((17,), 1e-30), torch.zeros(5), torch.tensor([1.0, math.nan])]
    found = [norm.item() for norm in local_norms(tensors)]
    assert found[0] == pytest.approx(1e30 * math.sqrt(4097), rel=1e-6)
    assert found[1] == pytest.approx(1e-30 * math.sqrt(17), rel=1e-6)
    assert found[2] == 0
    assert math.isnan(found[3])
