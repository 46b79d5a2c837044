"""Clipping by the global gradient norm, over plain tensors and sharded ones.

The norm is taken in fp32 (fp64 of fp64 gradients) on each rank's own shards; the squares of the ranks are then
gathered and added in rank order, not all-reduced, so that every rank holds the same bits and a rerun repeats them.
A gradient that is not a DTensor counts once: it must be the same on every rank.

An optimizer that reads each gradient once anyway is told the factor instead, which saves a pass over all of them.

Left out: norms other than 2, and partial (unreduced) gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.core.tensors import local_part
from fullweight.optim import update
from fullweight.optim.adamw import AdamW


def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norms: Sequence[Tensor] | None = None,
    across: dist.ProcessGroup | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most `max_norm`.

    Returns the norm before scaling, a scalar. A norm that is not finite scales nothing: the caller's
    guard decides what to do with the step. Collective when a gradient is sharded; waits for the device.
    `norms` are `local_norms` of the gradients that there are, when the caller has them. The ranks of `across`
    hold different parameters of one model, and all call. Gradients are scaled in place, except those of an AdamW
    among `optimizers`, whose next step scales them.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    # a rank of `across` may have no gradient, and still says so in the type and place of the others
    none = local_part(parameters[0]).new_zeros((), dtype=_wide(parameters[0])) if parameters else torch.zeros(())
    norm = global_norm(gradients, norms, across, none)
    scale_gradients(parameters, clip_factor(norm.item(), max_norm), optimizers)
    return norm


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this global norm are multiplied by."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0


def scale_gradients(
    parameters: Iterable[Tensor], factor: float, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Multiply gradients in place, or have an AdamW among `optimizers`, whose parameters they are, do it later."""
    later: set[Tensor] = set()
    for optimizer in optimizers:
        if isinstance(optimizer, AdamW):
            optimizer.gradient_scale = factor
            later.update(p for group in optimizer.param_groups for p in group["params"])
    now = [local_part(p.grad) for p in parameters if p.grad is not None and p not in later]
    if now and factor != 1.0:
        torch._foreach_mul_(now, factor)


@torch.no_grad()
def local_norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """2-norm of this rank's part of each tensor, scalars."""
    parts = [local_part(x) for x in tensors]
    if parts and update.compiled_for(parts):
        return list(update.norms(parts).unbind())
    # Row by row first: one fp32 accumulator over millions of entries loses four digits on a CPU.
    rows = (torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)) for x in parts)
    return [torch.linalg.vector_norm(each) for each in rows]


@torch.no_grad()
def global_norm(
    tensors: Sequence[Tensor],
    norms: Sequence[Tensor] | None = None,
    across: dist.ProcessGroup | None = None,
    none: Tensor | None = None,
) -> Tensor:
    """2-norm of all the tensors together (a scalar); collective over `across` and the meshes that shard them.

    `none` is the scalar 0 that stands for no tensors.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for tensor, norm in zip(tensors, local_norms(tensors) if norms is None else norms, strict=True):
        by_groups.setdefault(_sharding_groups(tensor), []).append(norm)
    squares = [_sum_over(torch.stack(norms).square().sum(), groups) for groups, norms in by_groups.items()]
    total = torch.stack(squares).sum() if squares else torch.zeros(()) if none is None else none.detach()
    return _sum_over(total, () if across is None else (across,)).sqrt()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """One process group for each mesh axis that cuts the tensor; replicas are counted once."""
    if not isinstance(tensor, DTensor):
        return ()
    assert not any(p.is_partial() for p in tensor.placements), "gradients must be reduced before clipping"
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(axis) for axis, p in enumerate(tensor.placements) if not p.is_replicate())


def _sum_over(value: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    for group in groups:
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value, group=group)
        value = torch.stack(parts).sum()
    return value
