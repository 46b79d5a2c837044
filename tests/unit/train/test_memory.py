"""A run that this machine cannot hold is refused before it is made; ranks share what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fullweight.core import machine
from fullweight.core.config import apply_overrides, read_toml
from fullweight.core.errors import ConfigError
from fullweight.devices import MemoryUse
from fullweight.devices.cuda import Cuda
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.optim.groups import build_optimizers
from fullweight.parallel.config import Layout
from fullweight.train.config import RunConfig
from fullweight.train.memory import check_memory, state_bytes
from fullweight.train.trainable import freeze

SMOKE = Path(__file__).parents[3] / "recipes" / "tiny_smoke.toml"
OFFLOAD = "parallel.offload_optimizer=true"
CPU = torch.device("cpu")


def free_on_device(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The accelerator, which this machine may lack, has so many bytes left."""
    monkeypatch.setattr(Cuda, "memory", lambda _self: MemoryUse(0, 0, 0, free, free))


def recipe(*overrides: str) -> RunConfig:
    return RunConfig.resolve(apply_overrides(read_toml(SMOKE), list(overrides)))


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_count_is_what_a_step_really_holds(name: str, frozen: bool) -> None:
    """Weights, gradients and moments of a model after a step, read off the tensors themselves."""
    overrides = [f"optimizer.name={name}", *(['train.frozen=["embed*", "layers.0.*"]'] if frozen else [])]
    config = recipe(*overrides)
    architecture = config.model.architecture()
    model = initialise(DeepSeekV4(architecture, ops="reference"))
    if chosen := config.train.trained_names(architecture):
        freeze(model, chosen)
    optimizers = build_optimizers(model, model.parameter_roles(), config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    states = [s for o in optimizers for s in o.state.values()]
    held += [t for s in states for t in s.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
    assert state_bytes(config, architecture) == sum(t.numel() * t.element_size() for t in held)


def test_ranks_of_one_machine_hold_their_shares_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank cannot hold, eight machines can; replicas hold as much each; a machine's ranks add up."""
    config = recipe()
    architecture = config.model.architecture()
    whole = state_bytes(config, architecture)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: whole // 3)
    said = r"training 522,092 parameters \(weights, gradients and moments\) needs .* of memory.*train\.frozen"
    with pytest.raises(ConfigError, match=said):
        check_memory(config, architecture, Layout(), CPU)
    check_memory(config, architecture, Layout(shard=8), CPU)
    with pytest.raises(ConfigError, match="the shares of 1 of 8 ranks"):
        check_memory(config, architecture, Layout(shard=2, replicate=4), CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="the shares of 4 of 8 ranks"):
        check_memory(config, architecture, Layout(shard=8), CPU)
    check_memory(config, architecture, Layout(shard=16), CPU)


def test_a_device_is_a_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator its free memory counts, for one share."""
    config = recipe()
    architecture = config.model.architecture()
    whole = state_bytes(config, architecture)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    free_on_device(monkeypatch, whole // 3)
    check_memory(config, architecture, Layout(shard=8), torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="this rank's share"):
        check_memory(config, architecture, Layout(shard=2), torch.device("cuda", 0))


def test_offloaded_moments_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no room on the device, and the host's for all ranks of the machine."""
    plain, offloaded = recipe("optimizer.name=adamw"), recipe("optimizer.name=adamw", OFFLOAD)
    architecture, device = plain.model.architecture(), torch.device("cuda", 0)
    whole = state_bytes(plain, architecture)
    assert state_bytes(plain, architecture, with_moments=False) == whole // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free_on_device(monkeypatch, whole // 6)
    check_memory(offloaded, architecture, Layout(shard=4), device)
    with pytest.raises(ConfigError, match="weights, gradients and moments, this rank's share"):
        check_memory(plain, architecture, Layout(shard=4), device)
    with pytest.raises(ConfigError, match="weights and gradients, this rank's share"):
        check_memory(offloaded, architecture, Layout(shard=2), device)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: whole // 3)
    with pytest.raises(ConfigError, match="moments in host memory, the shares of 4 of 4 ranks"):
        check_memory(offloaded, architecture, Layout(shard=4), device)
