"""Fully sharded data parallelism (FSDP2): each block one unit, the rest of the model the root's.

Why this way: parameters stay fp32 and are gathered in fp32, because the model itself casts where the
mathematics allows it; a mixed-precision policy here would round the tensors that must stay fp32. Gradients
are *summed* over ranks: the loss is already divided by the global token count, so an average would divide
twice. The root owns every parameter outside a block (embedding, head, norms), which the model uses without
calling a module, and is never resharded between forward and backward.

Left out: mesh axes beyond data parallelism, mixed-precision gathering, host offload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard `model` in place over the one-dimensional `mesh`: every block a unit, the rest the root's.

    All ranks must hold equal parameters. Parameters become DTensors sharded on dimension 0 (uneven shards
    are allowed); their gradients are sums over ranks.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        # A parameter that no token of one rank reaches must not change which gradients are exchanged.
        unit.set_reduce_scatter_unused_params(True, recurse=False)


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


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module
