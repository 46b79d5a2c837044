"""Fully sharded data parallelism (FSDP2): each block one unit, the rest of the model the root's.

Experts that are dealt over ranks are a unit of their own inside their block: only the ranks that hold the same
experts share them. Parameters that are divided by heads stay in their block's unit, but are shared by the ranks
with the same heads. On a mesh of two axes (HSDP) parameters are cut over the second and copied over the first.
What a rank shares with no other stays as it is: FSDP would copy parameters and gradients, and exchange nothing.

Why this way: parameters stay fp32 and are gathered in fp32, because the model itself casts where the
mathematics allows it; a mixed-precision policy here would round the tensors that must stay fp32. Gradients
are *summed* over ranks: the loss is already divided by the global token count, so an average would divide
twice. The root owns every parameter outside a block (embedding, head, norms), which the model uses without
calling a module, and is never resharded between forward and backward. Gradients travel as fp32 or, when asked,
as bf16; micro-batches are always added up in fp32.

Left out: mixed-precision gathering, host offload.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
    TrainingState,
)
from torch.distributed.tensor import DTensor, Shard


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    own_mesh: Mapping[nn.Module, DeviceMesh] | None = None,
    reduce_dtype: torch.dtype | None = None,
    cut_mesh: DeviceMesh | None = None,
    by_rows: Collection[nn.Parameter] = (),
) -> None:
    """Shard `model` in place over `mesh` (shards, or replicas x shards): every block a unit, the rest the root's.

    `own_mesh` names modules inside of blocks whose parameters are sharded over another mesh; what else is a
    DTensor already, this rank's part of it, is sharded over `cut_mesh`. All ranks must hold equal parameters, or
    their parts of cut ones. Parameters become DTensors sharded on dimension 0 (uneven shards are allowed), those
    of `by_rows` on dimension 1 (which the shards must divide); their gradients are sums over ranks, exchanged in
    `reduce_dtype` (None: as they are, fp32). What would be sharded over one rank is left alone.
    """
    if mesh.size() == 1:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    alone: set[nn.Parameter] = set()
    if cut_mesh is not None and cut_mesh.size() == 1:
        elsewhere = {parameter for module in own_mesh or {} for parameter in module.parameters()}
        alone = {p for p in model.parameters() if isinstance(p, DTensor) and p not in elsewhere}
    for module, other in (own_mesh or {}).items():
        if other.size() == 1:
            alone.update(module.parameters())
        else:
            fully_shard(module, mesh=other, mp_policy=policy, shard_placement_fn=_placement(None, by_rows))
    place = _placement(cut_mesh, by_rows)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=place, ignored_params=alone)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=alone)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        # A parameter that no token of one rank reaches must not change which gradients are exchanged.
        unit.set_reduce_scatter_unused_params(True, recurse=False)


def _placement(
    cut_mesh: DeviceMesh | None, by_rows: Collection[nn.Parameter]
) -> Callable[[nn.Parameter], Shard | ShardPlacementResult | None]:
    """Those of `by_rows` along dimension 1; of the rest DTensors on `cut_mesh`, others where the unit's are."""
    rows = set(by_rows)
    info: FSDPMeshInfo | None = None
    if cut_mesh is not None:
        replicated = cut_mesh.ndim > 1
        info = HSDPMeshInfo(cut_mesh, 1, replicate_mesh_dim=0) if replicated else FSDPMeshInfo(cut_mesh, 0)

    def place(parameter: nn.Parameter) -> Shard | ShardPlacementResult | None:
        if parameter in rows:
            return Shard(1)
        if info is not None and isinstance(parameter, DTensor):
            return ShardPlacementResult(Shard(0), info)
        return None

    return place


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every parameter is whole on every rank: for generation and export. Identity when unsharded.

    All ranks must enter together. Gradients are off inside: a gathered model is for reading.
    """
    units = list(_units(model))
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        root = model
        for unit in units:
            unit.set_reshard_after_forward(unit is not root, recurse=False)
            unit.reshard()


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Within it backward passes add up gradients on each rank; they are reduced over ranks once, on leaving.

    From its first use to the end, every parameter stays whole on every rank, and so do the gradients, in fp32. All
    ranks must enter together and run forward passes of all units. Identity when unsharded.
    """
    units = list(_units(model))
    if not units:
        yield
        return
    root, groups = _begin_passes(model, units)
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_reshard_after_forward(False, recurse=False)
    for group in groups:
        for parameter in group.fsdp_params:
            parameter.reduce_dtype = None  # that of sums over micro-batches; the group has that of the exchange
    yield
    for unit in units:
        unit.set_is_last_backward(True)
        unit.set_requires_gradient_sync(True, recurse=False)
        unit.set_reshard_after_backward(True, recurse=False)
        unit.set_reshard_after_forward(unit is not model, recurse=False)
    # what autograd's hooks would do after the only backward pass, and torch's own pipeline stages do like this
    for group in groups:
        group.post_backward()
    root._root_post_backward_final_callback()


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Within it forward and backward passes of several micro-batches may alternate, each as if it were alone.

    Parameters are gathered for a pass and let go after it; each backward reduces its gradients over ranks, and the
    shards add them up in fp32. As `accumulating` otherwise; every backward must be of the whole model.
    """
    units = list(_units(model))
    if not units:
        yield
        return
    root, groups = _begin_passes(model, units)
    yield
    for unit in units:
        unit.set_is_last_backward(True)
    for group in groups:
        group._training_state = TrainingState.POST_BACKWARD  # nothing is left to reduce
    root._root_post_backward_final_callback()


def _begin_passes(model: nn.Module, units: Iterable[FSDPModule]) -> tuple[Any, list[Any]]:
    """FSDP's state of the root, and all its groups of parameters, told that more backward passes follow each."""
    root: Any = fully_shard.state(model)  # type: ignore[attr-defined]
    root._lazy_init()
    for unit in units:
        unit.set_is_last_backward(False)
    return root, [group for state in root._state_ctx.all_states for group in state._fsdp_param_groups]


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module
