"""A stage as the schedules of torch.distributed.pipelining see it.

The schedules call a stage to run a micro-batch forward or backward and to say what it sends and receives. Torch's
own stage finds shapes by a trial run and an exchange of scalars; this one is told them, so it communicates nothing
but payloads and reads no tensor's value, and runs on fake tensors as it does on real ones. What arrives has memory
from its request to its use. Gradients are not scaled, and FSDP is left to the engine around the step.

A backward pass in two halves: the first returns the gradients of what was received, and forms all weight gradients
but the products that were put off (`ops/late.py`); the second forms those.

Built on the private base class of torch 2.13's stages, whose hooks are what the schedules call; torch is pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._utils import _TensorMeta
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

from fullweight.core import phase
from fullweight.ops.late import WeightGradients
from fullweight.parallel.engine import micro_batch


@dataclass(frozen=True)
class Slot:
    """One tensor that passes between two stages, and whether its gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool

    def meta(self, *, is_gradient: bool = False) -> _TensorMeta:
        strides = [1]
        for size in self.shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        return _TensorMeta(
            torch.Size(self.shape), tuple(strides), self.dtype, self.has_gradient and not is_gradient
        )


Run = Callable[[int, tuple[Tensor, ...]], Tensor | tuple[Tensor, ...]]
"""(number of the micro-batch, received) -> what the stage hands on; of the last stage its loss."""


class Stage(_PipelineStageBase):
    """Stage `index` of `num_stages`, whose forward pass is `run`.

    `received` and `handed_on` describe what comes from the stage before and goes to the stage behind. Weight
    gradients that `run` puts off are in `late`, None when the schedule does not split backward.
    """

    def __init__(
        self,
        run: Run,
        index: int,
        num_stages: int,
        received: tuple[Slot, ...],
        handed_on: tuple[Slot, ...],
        device: torch.device,
        group: dist.ProcessGroup,
        late: WeightGradients | None = None,
    ) -> None:
        super().__init__(
            _Module(run), index, num_stages, device, group, dw_builder=late.take if late is not None else None
        )
        meta = self._stage_meta
        meta.inputs = tuple(slot.meta() for slot in received)
        meta.outputs = tuple(slot.meta() for slot in handed_on)
        meta.input_grads = tuple(slot.meta(is_gradient=True) if slot.has_gradient else None for slot in received)
        meta.output_grads = tuple(slot.meta(is_gradient=True) if slot.has_gradient else None for slot in handed_on)

    # ---- preparation --------------------------------------------------------------------------------

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def _prepare_forward_infra(self, num_microbatches: int, *_: Any, **__: Any) -> None:
        assert self._stage_meta.inputs is not None and self._stage_meta.outputs is not None  # noqa: PT018
        for chunk in range(num_microbatches):
            self.args_recv_info[chunk] = tuple(
                _RecvInfo(f"payload {i}", self.stage_index - 1, None, meta)
                for i, meta in enumerate(self._stage_meta.inputs)
            )
        behind = {i: [self.stage_index + 1] for i in range(len(self._stage_meta.outputs))}
        self.act_send_info = {0: []} if self.is_last else behind  # the loss stays

    def _prepare_backward_infra(self, num_microbatches: int, *_: Any, **__: Any) -> None:
        self._setup_backward_recv_info(num_microbatches)

    def _create_grad_recv_info(self, act_send_info: dict[int, list[int]]) -> tuple[_RecvInfo, ...]:
        assert self._stage_meta.output_grads is not None
        return tuple(
            _RecvInfo(f"gradient {i}", self.stage_index + 1, None, meta)
            for i, meta in enumerate(self._stage_meta.output_grads)
        )

    # ---- what arrives -------------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_room(self, infos: tuple[_RecvInfo, ...]) -> None:
        for info in infos:
            meta = info.tensor_meta
            if meta is not None:
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        for info in self.args_recv_info[fwd_chunk_id]:
            info.buffer = None
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        infos = self.grad_recv_info[bwd_chunk_id]
        gradients = tuple(info.buffer for info in infos)
        for info in infos:
            info.buffer = None
        return gradients

    # ---- passes -------------------------------------------------------------------------------------

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        phase.enter("forward", micro_batch(fwd_chunk_id))
        return super().forward_one_chunk(fwd_chunk_id, (), {"number": fwd_chunk_id}, save_forward_output)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        phase.enter("backward", micro_batch(bwd_chunk_id))
        super().backward_one_chunk(bwd_chunk_id, *arguments, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        phase.enter("backward", micro_batch(bwd_chunk_id))
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        """The gradients of the received tensors; those of parameters are added up, but for what is put off."""
        assert backward_type == "full", "weight gradients are put off, no graph is walked twice"
        if self.is_last:
            outputs, gradients = (bwd_kwargs["stage_output"],), (None,)
        else:
            outputs, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        pairs = [(out, gradient) for out, gradient in zip(outputs, gradients, strict=True) if out.requires_grad]
        if pairs:
            # an output that only a loss of this stage makes differentiable gets no gradient from behind
            filled = [g if g is not None or self.is_last else torch.zeros_like(out) for out, g in pairs]
            torch.autograd.backward([out for out, _ in pairs], filled)
        tensors = [value for value in bwd_kwargs["input_values"] if isinstance(value, Tensor)]
        found = tuple(tensor.grad for tensor in tensors)
        for tensor in tensors:
            tensor.grad = None
        return found, None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: the engine reduces the gradients of all stages of a rank at once."""


class _Module(nn.Module):
    """The module that a stage calls; it holds no parameters, so that no schedule minds their sharding."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *received: Tensor, number: int) -> Any:
        return self.run(number, received)
