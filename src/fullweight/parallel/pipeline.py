"""Pipeline parallelism: parts of the model on different ranks, ordered by torch's own schedules.

The schedules of torch.distributed.pipelining say which stage runs which micro-batch when, and who sends what to
whom (`pipeline_stage.py`). Between stages pass the streams and, for the MTP block on the last one, the embedding;
the gradient of each comes back where something in front of it trains. Every rank has the whole batch, so token ids
reach hash layers, and masks and positions every layer, without being sent. A stage's own losses (indexer, balance)
join the graph at its output. FSDP keeps a stage's parameters whole, and its gradients unreduced, for one step, or
for each pass of a micro-batch alone.

Left out: overlap of the reduction with the last backward passes.
Source: 1F1B (arXiv 2006.09503), interleaved (2104.04473), zero bubble and its V (2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from fullweight.core import phase
from fullweight.core.types import Batch
from fullweight.models.deepseek_v4.block import Block
from fullweight.models.deepseek_v4.model import DeepSeekV4, ModelOutput
from fullweight.models.deepseek_v4.parts import Part, parts_of
from fullweight.ops.late import WeightGradients, put_off
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.engine import Mark, PassOutput, Shares, Weigh
from fullweight.parallel.fsdp import accumulating
from fullweight.parallel.mesh import Ranks
from fullweight.parallel.pipeline_stage import Slot, Stage
from fullweight.parallel.stages import Schedule, balanced_layers, rank_of, stages_of

_MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
_SPLITS_BACKWARD = ("zero_bubble", "zbv")


@dataclass(frozen=True)
class Division:
    """A model's parts, one a stage, and the stages that this rank of the pipeline holds.

    `streams_train[s]` says whether anything before stage s trains through the streams, `embedding_trains` whether
    the embedding does: no gradient goes back where nothing waits for it.
    """

    schedule: Schedule
    num_ranks: int
    rank: int
    parts: tuple[Part, ...]
    streams_train: tuple[bool, ...]
    embedding_trains: bool

    @staticmethod
    def of(
        model: DeepSeekV4, layer_counts: Sequence[int], schedule: Schedule, num_ranks: int, rank: int
    ) -> Division:
        """Of a whole model (frozen where it will be), cut into so many main layers a stage."""
        embedding = model.embed.weight.requires_grad
        carries = [embedding]
        for block in model.layers:
            assert isinstance(block, Block)
            carries.append(carries[-1] or any(p.requires_grad for p in block.carriers()))
        parts = parts_of(layer_counts)
        trains = tuple(carries[part.layers.start] for part in parts)
        return Division(schedule, num_ranks, rank, parts, trains, embedding)

    @property
    def held(self) -> tuple[int, ...]:
        """This rank's stages, in order."""
        return stages_of(self.rank, self.num_ranks, len(self.parts), self.schedule)

    @property
    def held_parts(self) -> list[Part]:
        return [self.parts[stage] for stage in self.held]

    def rank_of(self, stage: int) -> int:
        return rank_of(stage, self.num_ranks, self.schedule)


def divide(model: DeepSeekV4, ranks: Ranks, config: ParallelConfig, row_tokens: int) -> Division | None:
    """How a whole model (on the meta device, frozen where it will be) is divided; None without a pipeline."""
    layout = ranks.layout
    if layout.pipeline == 1:
        return None
    num_stages = layout.pipeline * config.virtual_stages
    counts = config.stage_layers or balanced_layers(model.config, num_stages, row_tokens)
    return Division.of(model, counts, config.schedule, layout.pipeline, layout.stage(ranks.rank))


@dataclass
class _Pass:
    """What the micro-batches of one call share, and what they have added up to."""

    batches: Sequence[Batch]
    weigh: Weigh
    losses: dict[str, Tensor]
    expert_counts: Tensor
    dropped: Tensor

    def add(self, output: PassOutput, part: Part) -> None:
        for name, value in output.losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach().double()
        rows = slice(part.layers.start, part.layers.start + len(output.expert_counts))
        self.expert_counts[rows] += output.expert_counts
        self.dropped[rows] += output.dropped

    def shares(self) -> Shares:
        return Shares(self.losses, self.expert_counts, self.dropped)


class PipelineEngine:
    """The engine (`engine.Engine`) of a rank that holds some stages of a model.

    `forward(model, batch)` is the method's; the last stage gives it its part in place of the model. Whole rows
    have `num_tokens` tokens. `group` are the ranks of the pipeline, in order of their stages. `passes` surrounds a
    step's passes (`fsdp.accumulating` or `fsdp.resharding`).
    """

    def __init__(
        self,
        model: DeepSeekV4,
        forward: Callable[[Any, Batch], PassOutput],
        division: Division,
        group: dist.ProcessGroup,
        device: torch.device,
        num_tokens: int,
        passes: Callable[[nn.Module], AbstractContextManager[None]] = accumulating,
    ) -> None:
        self.model, self.forward, self.division, self.passes = model, forward, division, passes
        self.group, self.device, self.num_tokens = group, device, num_tokens
        self._schedules: dict[int, PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._pass = self._new_pass([], _no_total)

    # ---- training -----------------------------------------------------------------------------------

    def run(self, batches: Sequence[Batch], weigh: Weigh, mark: Mark) -> Shares:
        """See `Engine.run`; a schedule mixes forward and backward, so their time is one phase."""
        self._pass, count = self._new_pass(batches, weigh), len(batches)
        if count not in self._schedules:
            self._schedules[count] = self._schedule(count)
        with self.passes(self.model):
            # a stage finds its batch by the micro-batch's number; the target is only there to be counted
            self._schedules[count].step(target=torch.arange(count), return_outputs=False)
            phase.enter("backward", "sums over ranks")
        mark("forward_backward")
        return self._end()

    def _schedule(self, count: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        stages = [self._stage(index) for index in self.division.held]
        if self.division.schedule == "1f1b":
            return Schedule1F1B(stages[0], count, loss_fn=_as_it_is, scale_grads=False)
        return _MULTI[self.division.schedule](stages, count, loss_fn=_as_it_is, scale_grads=False)  # type: ignore[arg-type]

    def _stage(self, index: int) -> Stage:
        part = self.division.parts[index]
        late = WeightGradients() if self.division.schedule in _SPLITS_BACKWARD else None

        def run(number: int, received: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            with put_off(late) if late is not None else nullcontext():
                return self._forward_and_weigh(part, number, received)

        received = () if part.is_first else self._slots(index)
        handed_on = () if part.is_last else self._slots(index + 1)
        count = len(self.division.parts)
        return Stage(run, index, count, received, handed_on, self.device, self.group, late)

    def _forward_and_weigh(
        self, part: Part, number: int, received: tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        """The weighted loss of the last part; what another part hands on, with its own losses attached."""
        output = self._output(part, self._pass.batches[number], received)
        self._pass.add(output, part)
        total = self._pass.weigh(output.losses)
        if part.is_last:
            return total
        streams, *rest = _handed_on(output, received)
        return (_Attached.apply(streams, total) if total.requires_grad else streams, *rest)

    def _slots(self, stage: int) -> tuple[Slot, ...]:
        """What a stage receives."""
        gradients = (self.division.streams_train[stage], self.division.embedding_trains)
        shapes = self.model.payload_shapes(self.num_tokens)
        return tuple(Slot(shape, self.model.compute_dtype, g) for shape, g in zip(shapes, gradients, strict=False))

    # ---- evaluation ---------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Shares:
        """See `Engine.evaluate`: as many micro-batches at a time as there are ranks, stage after stage."""
        self._pass, size = self._new_pass(batches, _no_total), self.division.num_ranks
        for start in range(0, len(batches), size):
            numbers = range(start, min(start + size, len(batches)))
            kept: dict[int, tuple[Tensor, ...]] = {}  # for the next stage, where it is on this rank too
            sent: list[tuple[dist.Work | None, Tensor]] = []
            for stage in self.division.held:
                for number in numbers:
                    received = kept.pop(number) if number in kept else self._receive(stage)
                    payload = self._forward(stage, number, received)
                    if stage + 1 in self.division.held:
                        kept[number] = payload
                    else:
                        sent += self._send(payload, stage + 1)
            for work, _ in sent:
                if work is not None:
                    work.wait()
        return self._end()

    def _forward(self, stage: int, number: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part = self.division.parts[stage]
        output = self._output(part, self._pass.batches[number], received)
        self._pass.add(output, part)
        return () if part.is_last else _handed_on(output, received)

    def _receive(self, stage: int) -> tuple[Tensor, ...]:
        if self.division.parts[stage].is_first:
            return ()
        slots = self._slots(stage)
        buffers = tuple(torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in slots)
        for buffer in buffers:
            dist.recv(buffer, group=self.group, group_src=self.division.rank_of(stage - 1))
        return buffers

    def _send(self, payload: tuple[Tensor, ...], stage: int) -> list[tuple[dist.Work | None, Tensor]]:
        """Sends under way, with the tensors that must live until they end."""
        tensors = [tensor.contiguous() for tensor in payload]
        return [(dist.isend(t, group=self.group, group_dst=self.division.rank_of(stage)), t) for t in tensors]

    # ---- both ---------------------------------------------------------------------------------------

    def _new_pass(self, batches: Sequence[Batch], weigh: Weigh) -> _Pass:
        config = self.model.config
        rows = config.num_hidden_layers + config.num_nextn_predict_layers
        counts = torch.zeros(rows, config.n_routed_experts, dtype=torch.int64, device=self.device)
        return _Pass(batches, weigh, {}, counts, counts.new_zeros(rows))

    def _end(self) -> Shares:
        shares = self._pass.shares()
        self._pass = self._new_pass([], _no_total)
        return shares

    def _output(self, part: Part, batch: Batch, received: tuple[Tensor, ...]) -> Any:
        if part.is_last:
            return self.forward(_LastPart(self.model, part, received), batch)
        return self.model(batch, part=part, received=received)


class _LastPart:
    """What a method sees as the model: called with a batch, it goes on from what the stage received."""

    def __init__(self, model: DeepSeekV4, part: Part, received: tuple[Tensor, ...]) -> None:
        self._model, self._part, self._received = model, part, received

    def __call__(self, batch: Batch, with_losses: bool | None = None) -> ModelOutput:
        return self._model(batch, with_losses, self._part, self._received)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Attached(torch.autograd.Function):
    """The streams, behind which a scalar loss is differentiated too, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad, torch.ones((), dtype=dtype, device=device)


def _handed_on(output: ModelOutput, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the next stage gets; what a stage did not change goes on without a detour through sharding hooks."""
    return (*output.payload, *received[len(output.payload) :])


def _as_it_is(output: Tensor, _number: Tensor) -> Tensor:
    return output


def _no_total(_losses: dict[str, Tensor]) -> Tensor:
    return torch.zeros(())
