"""A model made for one device becomes this rank's part of a layout: one function, one written order.

1. Recompute and capacity: which activations are made again in backward, and what experts drop.
2. Stages: of a pipeline's blocks this rank keeps its own stages'.
3. Slice: the model learns which tokens of a row are this rank's, and whom to ask for the others.
4. Cut: parameters that `models/deepseek_v4/sharding.py` names become DTensors that hold this rank's part.
5. FSDP: what is cut over other ranks than the rest has its own mesh; gradients are summed, never averaged.

Stacked experts are cut between matrices, so that each lies whole on one rank, as Muon wants it. Where that leaves
ranks with less than others, or with none, and the optimiser does not care, they are cut along the rows of their
matrices instead.

Optimisers come after it, for FSDP replaces the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fullweight.core.tensors import local_part
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.moe import Experts
from fullweight.models.deepseek_v4.sharding import Cut, cut_of
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.context import SlicedTokens
from fullweight.parallel.expert import ExpertExchange
from fullweight.parallel.fsdp import shard
from fullweight.parallel.mesh import Meshes, Ranks
from fullweight.parallel.pipeline import Division


def parallelize(
    model: DeepSeekV4,
    ranks: Ranks,
    config: ParallelConfig,
    units: Sequence[nn.Module],
    division: Division | None = None,
    *,
    whole_experts: bool,
) -> None:
    """Lay `model` out over the ranks, in place; `units` are the modules that FSDP gathers one at a time.

    All ranks must hold equal parameters, or parameters on the meta device. `division` is that of a pipeline.
    `whole_experts`: every matrix of an expert stays on one rank, whatever that does to the balance.
    """
    model.set_recompute(config.recompute)
    model.set_expert_capacity(config.expert_capacity_factor)
    if division is not None:
        model.keep(division.held_parts)
        held = set(model.modules())
        units = [unit for unit in units if unit in held]
    meshes = ranks.meshes
    if meshes is None:
        return
    _slice_rows(model, meshes)
    _cut(model, meshes)
    own_mesh: dict[nn.Module, DeviceMesh] = {}
    if meshes.expert is not None:
        assert meshes.experts is not None
        exchange = ExpertExchange(meshes.expert.get_group())
        for module in model.modules():
            if isinstance(module, Experts):
                module.dispatch, own_mesh[module] = exchange, meshes.experts
    by_rows = [] if whole_experts else _uneven_experts(model, meshes.experts or meshes.dense)
    reduce_dtype = torch.bfloat16 if config.reduce_dtype == "bf16" else None
    shard(model, units, meshes.dense, own_mesh, reduce_dtype, meshes.heads, by_rows)


def _uneven_experts(model: nn.Module, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Stacks that the shards of `mesh` cannot share matrix by matrix and can share row by row."""
    shards = mesh.size(mesh.ndim - 1)
    stacks = (p for m in model.modules() if isinstance(m, Experts) for p in m.parameters(recurse=False))
    here = ((p, local_part(p).shape) for p in stacks)
    return [p for p, (count, rows, _) in here if count % shards and rows % shards == 0]


def _slice_rows(model: DeepSeekV4, meshes: Meshes) -> None:
    """Let the model run on this rank's slice of each row."""
    if meshes.slices is not None:
        model.axis = SlicedTokens(
            meshes.slices.get_group(),
            context=None if meshes.context is None else meshes.context.get_group(),
            tensor=None if meshes.tensor is None else meshes.tensor.get_group(),
        )


def _cut(model: nn.Module, meshes: Meshes) -> None:
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = cut_of(f"{module_name}.{name}")
            mesh = getattr(meshes, cut.axis) if cut is not None else None
            if cut is not None and mesh is not None:
                module.register_parameter(name, _part(parameter, cut, mesh))


@torch.no_grad()
def _part(parameter: nn.Parameter, cut: Cut, mesh: DeviceMesh) -> nn.Parameter:
    local = parameter.chunk(mesh.size(), cut.dim)[mesh.get_local_rank()].clone(
        memory_format=torch.contiguous_format
    )
    whole = DTensor.from_local(local, mesh, (Shard(cut.dim),), run_check=False)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
