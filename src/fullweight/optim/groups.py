"""Which optimiser each parameter gets, from the roles that the model states.

The model says for every parameter whether it is a matrix for Muon (and how many independent matrices are
stacked in it), and whether weight decay applies; this module checks the roles against the parameters and
builds one Muon and one AdamW. Both share one learning rate: Muon's update is scaled to AdamW's usual RMS.
Master weights are fp32, and so are all moments. Wrap the model for sharding first: the wrapper replaces the
parameters.

Source: DeepSeek-V4 report, sections 2.4 and 4.2. Left out: separate learning rates by group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.core.config import Config
from fullweight.core.errors import TrainingError
from fullweight.core.role import ParameterRole
from fullweight.optim.adamw import AdamW, AdamWConfig, build_adamw
from fullweight.optim.muon import Muon, MuonConfig
from fullweight.optim.offload import HostAdamW, HostMuon
from fullweight.optim.pieces import unsupported


class OptimizerConfig(Config):
    """Optimiser of all parameters; the learning rate is the peak and has to be chosen."""

    name: Literal["muon", "adamw"] = Field("muon", description="muon: matrices by Muon, the rest by AdamW")
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.1, ge=0, description="decoupled: times the learning rate, each step")
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()


@dataclass(frozen=True)
class OptimizerShare:
    """How much of the model an optimiser owns (whole model, not one rank's shard)."""

    num_tensors: int
    num_matrices: int  # independent matrices; 0 for AdamW
    num_parameters: int


def build_optimizers(
    model: torch.nn.Module, roles: Mapping[str, ParameterRole], config: OptimizerConfig, *, offload: bool = False
) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] over the model's trainable parameters; an optimiser without parameters is left out.

    With `offload` their moments live in host memory (`offload.py`).

    Raises TrainingError when a trainable parameter has no role or one that its shape, dtype or sharding
    does not fit, when a role names no parameter, and when nothing is trainable.
    """
    named = dict(model.named_parameters())
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    _check(named, trainable, roles, config.name)
    # Groups by what a step treats alike: one fused AdamW call takes tensors of one mesh only.
    groups: dict[str, dict[Any, dict[str, Any]]] = {"muon": {}, "adamw": {}}
    for name, parameter in trainable.items():
        role = roles[name]
        chosen = "adamw" if config.name == "adamw" else role.optimizer
        decay = config.weight_decay if role.weight_decay else 0.0
        options: dict[str, Any] = {"weight_decay": decay}
        if chosen == "muon":
            options["num_matrices"] = role.num_matrices
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = groups[chosen].setdefault((*options.values(), mesh), {"params": [], **options})
        group["params"].append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if groups["muon"]:
        muon = HostMuon if offload else Muon
        optimizers.append(muon(list(groups["muon"].values()), config.muon, config.learning_rate))
    if groups["adamw"]:
        adamw = HostAdamW if offload else AdamW
        optimizers.append(build_adamw(list(groups["adamw"].values()), config.adamw, config.learning_rate, adamw))
    return optimizers


def kind(optimizer: torch.optim.Optimizer) -> Literal["muon", "adamw"]:
    """Its name in recipes, reports and checkpoints, which does not say where the moments are."""
    return "muon" if isinstance(optimizer, Muon) else "adamw"


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Set the rate of the next step everywhere."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def summary(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, OptimizerShare]:
    """Share of the model that each optimiser owns, by its `kind`."""
    shares: dict[str, OptimizerShare] = {}
    for optimizer in optimizers:
        groups = optimizer.param_groups
        shares[kind(optimizer)] = OptimizerShare(
            num_tensors=sum(len(g["params"]) for g in groups),
            num_matrices=sum(len(g["params"]) * g.get("num_matrices", 0) for g in groups),
            num_parameters=sum(p.numel() for g in groups for p in g["params"]),
        )
    return shares


def _check(
    named: Mapping[str, Tensor], trainable: Mapping[str, Tensor], roles: Mapping[str, ParameterRole], name: str
) -> None:
    if not trainable:
        raise TrainingError("the model has no trainable parameter; leave requires_grad on for what must train")
    without = sorted(trainable.keys() - roles.keys())
    if without:
        raise TrainingError(
            f"no optimiser role for {_some(without)}; the model's parameter_roles() must name every parameter"
        )
    unknown = sorted(roles.keys() - named.keys())
    if unknown:
        raise TrainingError(f"optimiser roles for parameters that the model does not have: {_some(unknown)}")
    for key, parameter in trainable.items():
        _check_one(key, parameter, roles[key])
        if name == "muon" and roles[key].optimizer == "muon":
            _check_placement(key, parameter)


def _check_one(name: str, parameter: Tensor, role: ParameterRole) -> None:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TrainingError(f"{name} is {parameter.dtype}; master weights are float32: call model.float()")
    if role.optimizer != "muon":
        return
    shape, count = tuple(parameter.shape), role.num_matrices
    rows = parameter.numel() // shape[-1] if len(shape) > 1 and parameter.numel() else 0
    if count < 1 or rows < 1 or rows % count:
        raise TrainingError(
            f"{name} of shape {shape} is not {count} equal matrices; Muon takes matrices stacked along the "
            "leading dimensions, anything else needs the role adamw"
        )


def _check_placement(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, DTensor) and unsupported(parameter):
        raise TrainingError(
            f"{name} is placed {parameter.placements}; Muon takes cuts of a parameter's first and last dimension "
            "alone"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
