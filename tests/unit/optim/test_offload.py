"""Moments on the host: the same bits, at most two buckets on the device, and a state that can be read back."""

from __future__ import annotations

import io
import weakref
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fullweight.core.role import ParameterRole
from fullweight.optim import buckets
from fullweight.optim.adamw import AdamW
from fullweight.optim.groups import OptimizerConfig, build_optimizers, kind, set_learning_rate, summary
from fullweight.optim.offload import Copies, HostMoments, host_tensors, moment_like

STEPS = 4
LIMIT = 4 * 100  # bytes: a hundred entries
# Uneven buckets: several small parameters, one of two buckets' size, one without gradient at some steps or ever.
SHAPES: dict[str, tuple[tuple[int, ...], ParameterRole]] = {
    "small": ((4, 6), ParameterRole("muon")),
    "as_small": ((4, 6), ParameterRole("muon", weight_decay=False)),
    "large": ((3, 8, 9), ParameterRole("muon", num_matrices=3)),
    "seldom": ((5, 7), ParameterRole("muon")),
    "never": ((6, 7), ParameterRole("muon")),
    "last": ((9, 11), ParameterRole("muon")),
    "embedding": ((13, 4), ParameterRole("adamw")),
    "whole_bucket": ((10, 10), ParameterRole("adamw")),
    "norm": ((5,), ParameterRole("adamw", weight_decay=False)),
    "scale": ((1,), ParameterRole("adamw", weight_decay=False)),
}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", LIMIT)


def build(name: str, offload: bool) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for key, (shape, _) in SHAPES.items():
        model.register_parameter(key, nn.Parameter(torch.randn(shape, generator=generator)))
    config = OptimizerConfig.resolve({"name": name, "learning_rate": 0.05})
    return model, build_optimizers(model, {n: r for n, (_, r) in SHAPES.items()}, config, offload=offload)


def advance(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizers, 0.05 / (step + 1))
        for index, (name, parameter) in enumerate(model.named_parameters()):
            seed = torch.Generator().manual_seed(100 * step + index)
            reached = name != "never" and (name != "seldom" or step == 2)
            parameter.grad = torch.randn(parameter.shape, generator=seed) if reached else None
        for optimizer in optimizers:
            optimizer.step()


def state_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    state = {name: p.detach() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{kind(optimizer)}.{name}.{key}"] = value
    return state


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Recorder(Copies):
    """Plain copies that know which of the tensors they brought are still there."""

    def __init__(self) -> None:
        self.there: list[list[weakref.ref[Tensor]]] = []
        self.most_buckets = self.most_bytes = 0
        self.events: list[str] = []
        self.left: list[tuple[int, bool]] = []

    def bring(self, host: Sequence[Tensor]) -> list[Tensor]:
        moved = super().bring(host)
        self.events.append("bring")
        self.there.append([weakref.ref(tensor) for tensor in moved])
        alive = [[tensor for ref in bucket if (tensor := ref()) is not None] for bucket in self.there]
        self.most_buckets = max(self.most_buckets, sum(1 for bucket in alive if bucket))
        self.most_bytes = max(self.most_bytes, sum(t.nbytes for bucket in alive for t in bucket))
        return moved

    def wait(self) -> None:
        self.events.append("wait")

    def leave(self, device: Sequence[Tensor], host: Sequence[Tensor], fresh: bool) -> None:
        self.events.append("leave")
        self.left.append((len(device), fresh))
        super().leave(device, host, fresh)

    def finish(self) -> None:
        self.events.append("finish")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_bits_are_those_without_offload(name: str) -> None:
    """Weights, moments and counters after four steps; a parameter that no step reached has no state in either."""
    plain, offloaded = build(name, False), build(name, True)
    advance(*plain, range(STEPS))
    advance(*offloaded, range(STEPS))
    found = state_of(*offloaded)
    assert_same_bits(state_of(*plain), found)
    assert not any(".never." in key for key in found)
    assert summary(offloaded[1]) == summary(plain[1])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_at_most_two_buckets_are_on_the_device(name: str) -> None:
    """A bucket is brought while the one before is updated, and the one before that has gone."""
    model, optimizers = build(name, True)
    for optimizer in optimizers:
        assert isinstance(optimizer, HostMoments)
        optimizer.copies = recorder = Recorder()
        in_buckets = [[p for _, p in bucket] for bucket in buckets.buckets(optimizer.param_groups)]
        advance(model, [optimizer], range(1))
        assert recorder.most_bytes == 0  # the first step makes the moments, and brings none
        reached = sum(any(p.grad is not None for p in bucket) for bucket in in_buckets)
        assert [fresh for _, fresh in recorder.left] == [True] * reached
        recorder.events.clear()
        moments = 1 if kind(optimizer) == "muon" else 2
        for step in range(1, STEPS):
            recorder.most_buckets = recorder.most_bytes = 0
            advance(model, [optimizer], range(step, step + 1))
            sizes = [sum(p.nbytes for p in bucket if p.grad is not None) for bucket in in_buckets]
            sizes = [size for size in sizes if size]
            assert recorder.most_buckets == 2 <= len(sizes)
            if step != 2:  # at which "seldom" has no moments yet that could be brought
                assert recorder.most_bytes == moments * max(a + b for a, b in pairwise(sizes))
        assert all(ref() is None for bucket in recorder.there for ref in bucket)
        first = recorder.events[: recorder.events.index("finish") + 1]
        inner = ["wait", "bring", "leave"] * (reached - 1)
        assert first == ["bring", *inner, "wait", "leave", "finish"]


def test_buckets_are_filled_in_order() -> None:
    """None above the limit but a parameter that is; the order of the groups; nothing twice or missing."""
    model, optimizers = build("adamw", False)
    found = buckets.buckets(optimizers[0].param_groups)
    names = {p: name for name, p in model.named_parameters()}
    assert [[names[p] for _, p in bucket] for bucket in found] == [
        ["small"],
        ["large"],
        ["seldom", "never"],
        ["last"],
        ["embedding"],
        ["whole_bucket"],
        ["as_small", "norm", "scale"],
    ]
    assert all(parameter in set(group["params"]) for bucket in found for group, parameter in bucket)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_state_goes_through_state_dict(name: str) -> None:
    """Saved with offload, read without and the other way: both continue as the run that did not stop."""
    straight = build(name, False)
    advance(*straight, range(STEPS))
    for saved_with, read_with in [(True, False), (False, True), (True, True)]:
        model, optimizers = build(name, saved_with)
        advance(model, optimizers, range(2))
        buffer = io.BytesIO()
        torch.save((model.state_dict(), [o.state_dict() for o in optimizers]), buffer)
        buffer.seek(0)
        weights, states = torch.load(buffer)
        model, optimizers = build(name, read_with)
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        advance(model, optimizers, range(2, STEPS))
        assert_same_bits(state_of(*straight), state_of(model, optimizers))


def test_host_tensors_are_the_moments() -> None:
    """All of them and no counters; none of an optimiser without offload. They stay the same memory."""
    model, optimizers = build("adamw", True)
    assert host_tensors(optimizers[0]) == []
    advance(model, optimizers, range(1))
    first = {tensor.data_ptr() for tensor in host_tensors(optimizers[0])}
    reached = [p for p in model.parameters() if p.grad is not None]
    assert sum(t.numel() for t in host_tensors(optimizers[0])) == 2 * sum(p.numel() for p in reached)
    advance(model, optimizers, range(1, 2))
    assert {tensor.data_ptr() for tensor in host_tensors(optimizers[0])} == first
    plain = build("adamw", False)
    advance(*plain, range(1))
    assert host_tensors(plain[1][0]) == []
    parameter = next(model.parameters())
    for optimizer in (optimizers[0], plain[1][0]):
        room = moment_like(optimizer, parameter, torch.float64)
        assert (room.shape, room.dtype, room.requires_grad) == (parameter.shape, torch.float64, False)


def test_a_step_that_fails_leaves_the_param_groups_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = build("adamw", True)
    before = [list(map(id, group["params"])) for group in optimizers[0].param_groups]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        advance(model, optimizers, range(1))
    assert [list(map(id, group["params"])) for group in optimizers[0].param_groups] == before


def test_the_loss_of_a_closure_is_returned() -> None:
    model, optimizers = build("muon", True)

    def closure() -> float:
        loss = model.get_parameter("small").square().sum()
        loss.backward()
        return loss.item()

    start = model.get_parameter("small").detach().clone()
    assert optimizers[0].step(closure) == pytest.approx(float(start.square().sum()))
    assert not torch.equal(model.get_parameter("small"), start)
