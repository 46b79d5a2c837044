"""One training job as the cost model sees it: a model's work, a chip, a layout and a batch. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fullweight.planner.chips import Chip
from fullweight.planner.muon import Update
from fullweight.planner.shapes import Work

Recompute = Literal["none", "selective", "full"]
Precision = Literal["bf16", "fp8", "fp4"]


@dataclass(frozen=True)
class Job:
    """What a step is made of.

    `shard_parameters`: parameters are gathered and gradients reduced over data ranks (FSDP); else both once a
    step.

    `dispatch`: a fused exchange sends a token once to each rank, or to each group of near ones, and needs no
    numbers on the host; a plain one sends a copy for each expert, and the host waits for their numbers.

    Ranks count tensor fastest, then context, data, pipeline; experts lie on consecutive ranks of a stage.
    """

    work: Work
    chip: Chip
    ranks: int
    sequence: int
    global_batch: int  # rows of a step
    micro_batch: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    replicate: int = 1
    shard_parameters: bool = False
    each_round: bool = False  # of a pipeline: for every micro-batch, not once a step
    offload: bool = False
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    overlapped_bubble: bool = False  # DualPipe and zero-bubble schedules: half of the bubble is filled
    stage_costs: tuple[float, ...] | None = None  # forward FLOPs of a token by stage; even when absent
    expert_skew: float = 1.0  # load of the fullest expert rank over the mean
    expert_capacity: float | None = None  # most that an expert takes, in even shares; it drops the rest
    graphed: int = 0  # 0: every kernel is launched; 1: parts of a layer are captured; 2: the whole step, and fused
    dispatch: Literal["fused", "plain"] = "fused"
    hidden_exchange: bool = False  # tokens travel while another micro-batch computes
    narrow_attention: bool = False  # attention's products have the precision of the others
    unfused_attention: bool = False  # scores are written to memory, as before FlashAttention
    muon: Update | None = None  # of the busiest rank; None: all parameters under AdamW

    @property
    def data(self) -> int:
        """Groups of ranks with rows of their own."""
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def expert_load(self) -> float:
        """Rows that the fullest expert rank takes, over the mean of all that were chosen."""
        return self.expert_skew if self.expert_capacity is None else min(self.expert_skew, self.expert_capacity)

    @property
    def micro_batches(self) -> float:
        """Of a step, on each data rank."""
        return self.global_batch / (self.data * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch * self.sequence
