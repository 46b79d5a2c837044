"""The mixture of experts as grouped products: what devices with such products share.

Rows are sorted by expert, multiplied by their expert's matrices in one call and added up by token. Routing
weights are applied before the last product, in fp32, as in the reference. Row counts stay on the device:
nothing here waits for it. Kept for backward are the tokens and gate_up(x); rows and activations are made again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullweight.ops.late import Late


class GroupedProducts(ABC):
    """What a device brings. N rows are T * K choices; `ends` [X] int64 says where each expert's rows end."""

    @abstractmethod
    def spread(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's row once for each of its choices [T, K], sorted by expert: rows [N, d], and the place in
        them of each choice [N]."""

    @abstractmethod
    def total(self, rows: Tensor, place: Tensor, top_k: int) -> Tensor:
        """The sum over each token's choices: [N, d] -> [T, d]. The gradient of `spread`, and it of this."""

    @abstractmethod
    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """rows [N, in] @ weights [X, in, out] of each row's expert, in the rows' type."""

    @abstractmethod
    def outer(self, left: Tensor, right: Tensor, like: Tensor, ends: Tensor) -> Tensor:
        """left^T @ right over each expert's rows, shape and type of `like` [X, M, N]; 0 for one without rows."""

    @abstractmethod
    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor: ...

    @abstractmethod
    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, limit: float) -> Tensor: ...


class ExpertMixture(torch.autograd.Function):
    """At least one choice. One of no expert (number X) goes to the last, where its weight of 0 gives nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        limit: float,
        late_gate_up: Late | None,
        late_down: Late | None,
        kit: GroupedProducts,
    ) -> Tensor:
        dropped, chosen = chosen == gate_up.shape[0], chosen.clamp(max=gate_up.shape[0] - 1)
        ends = row_ends(chosen, gate_up.shape[0])
        rows, place = kit.spread(x, chosen)
        scale = torch.empty_like(weights.flatten()).scatter(0, place.long(), weights.flatten())
        hidden = kit.product(rows, gate_up.transpose(1, 2), ends)
        scaled = _scaled(kit.swiglu(hidden, limit), scale)
        out = kit.total(kit.product(scaled, down.transpose(1, 2), ends), place, chosen.shape[1])
        ctx.save_for_backward(x, chosen, dropped, place, ends, scale, hidden, gate_up, down)
        ctx.limit, ctx.late, ctx.kit = limit, (late_gate_up, late_down), kit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, chosen, dropped, place, ends, scale, hidden, gate_up, down = ctx.saved_tensors
        kit: GroupedProducts = ctx.kit
        grad_rows, _ = kit.spread(grad.contiguous(), chosen)
        dscaled = kit.product(grad_rows, down, ends)
        activation = kit.swiglu(hidden, ctx.limit)
        dscale = (dscaled.to(scale.dtype) * activation.to(scale.dtype)).sum(-1)
        dhidden = kit.swiglu_backward(_scaled(dscaled, scale), hidden, ctx.limit)
        del dscaled
        # before the weights' gradients, beside which a cast copy of the weights would make the step's peak
        dx = kit.total(kit.product(dhidden, gate_up, ends), place, chosen.shape[1])

        def gate_up_gradient() -> Tensor:
            return kit.outer(dhidden, kit.spread(x, chosen)[0], gate_up, ends)

        def down_gradient() -> Tensor:
            return kit.outer(grad_rows, _scaled(activation, scale), down, ends)

        gradients: list[Tensor | None] = []
        for late, form, wanted in zip(
            ctx.late, (gate_up_gradient, down_gradient), ctx.needs_input_grad[3:5], strict=True
        ):
            if late is not None:
                late.put(form)
            gradients.append(form() if late is None and wanted else None)
        dweights = dscale.gather(0, place.long()).view(chosen.shape).masked_fill(dropped, 0.0)
        return dx, None, dweights, *gradients, None, None, None, None


def by_expert(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The choices [T * K] in the order of their experts, and the place of each in that order; both int64."""
    order = torch.sort(chosen.flatten(), stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


def row_counts(chosen: Tensor, num_experts: int) -> Tensor:
    """How many choices each expert has: [X] int64, without waiting for the device."""
    flat = chosen.flatten()
    return flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))


def row_ends(chosen: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end once they are sorted: [X] int64."""
    return row_counts(chosen, num_experts).cumsum(0)


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.to(scale.dtype) * scale.unsqueeze(1)).to(rows.dtype)
