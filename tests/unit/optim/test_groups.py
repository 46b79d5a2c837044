"""Which optimiser each parameter gets, and the mistakes that are refused."""

import pytest
import torch
from torch import nn

from fullweight.core.errors import ConfigError, TrainingError
from fullweight.core.role import ParameterRole
from fullweight.optim.groups import (
    OptimizerConfig,
    OptimizerShare,
    build_optimizers,
    set_learning_rate,
    summary,
)

CONFIG = OptimizerConfig(learning_rate=0.01)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(10, 4))
        self.experts = nn.Parameter(torch.randn(5, 6, 4))
        self.norm = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


ROLES = {
    "embedding": ParameterRole("adamw"),
    "experts": ParameterRole("muon", num_matrices=10),
    "norm": ParameterRole("adamw", weight_decay=False),
}


def test_split_by_role() -> None:
    """Matrices to Muon, the rest to AdamW, weight decay by role, frozen parameters to none."""
    model = Small()
    muon, adamw = build_optimizers(model, ROLES, CONFIG)
    assert summary([muon, adamw]) == {"muon": OptimizerShare(1, 10, 120), "adamw": OptimizerShare(2, 0, 44)}
    decay = {id(p): g["weight_decay"] for o in (muon, adamw) for g in o.param_groups for p in g["params"]}
    assert decay == {id(model.embedding): 0.1, id(model.experts): 0.1, id(model.norm): 0.0}
    assert adamw.defaults["betas"] == (0.9, 0.95)
    assert adamw.defaults["eps"] == 1e-20


def test_adamw_for_all() -> None:
    """`name = "adamw"` takes every parameter and keeps each one's weight decay."""
    optimizers = build_optimizers(Small(), ROLES, OptimizerConfig(name="adamw", learning_rate=0.01))
    assert summary(optimizers) == {"adamw": OptimizerShare(3, 0, 164)}


def test_learning_rate_reaches_every_group() -> None:
    """One rate for both optimisers."""
    optimizers = build_optimizers(Small(), ROLES, CONFIG)
    set_learning_rate(optimizers, 0.5)
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.5}


def test_roles_must_match_the_parameters() -> None:
    """A parameter without a role and a role without a parameter are both named."""
    with pytest.raises(TrainingError, match="no optimiser role for embedding, norm"):
        build_optimizers(Small(), {"experts": ROLES["experts"]}, CONFIG)
    with pytest.raises(TrainingError, match="does not have: typo"):
        build_optimizers(Small(), ROLES | {"typo": ParameterRole("adamw")}, CONFIG)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_optimizers(Small().requires_grad_(False), ROLES, CONFIG)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("norm", ParameterRole("muon")),
        ("experts", ParameterRole("muon", num_matrices=7)),
        ("experts", ParameterRole("muon", num_matrices=0)),
    ],
)
def test_muon_takes_only_matrices(name: str, role: ParameterRole) -> None:
    """A vector, or a stack that does not divide, is refused with its shape."""
    with pytest.raises(TrainingError, match=f"{name} of shape .* equal matrices"):
        build_optimizers(Small(), ROLES | {name: role}, CONFIG)


def test_master_weights_are_fp32() -> None:
    """bf16 parameters would lose small updates."""
    with pytest.raises(TrainingError, match="master weights are float32"):
        build_optimizers(Small().bfloat16(), ROLES, CONFIG)


def test_config_mistakes() -> None:
    """The learning rate has no default; impossible values and unknown keys are named."""
    with pytest.raises(ConfigError, match="learning_rate is required"):
        OptimizerConfig.resolve({})
    with pytest.raises(ConfigError, match="learning_rate"):
        OptimizerConfig.resolve({"learning_rate": -1.0})
    with pytest.raises(ConfigError, match="did you mean 'momentum'"):
        OptimizerConfig.resolve({"learning_rate": 1.0, "muon": {"momentun": 0.9}})
