"""The layouts that a search looks at: sizes of axes, documents in a row, schedules, policies and cuts of stages.

Sizes are divisors of the number of ranks without prime factors above 5. Several documents in a row are what other
systems call a larger micro-batch. Every schedule that this system runs is here, with the numbers of virtual stages
that are usual. Stages are cut by cost, and by hand where a rank is a little too full. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.stages import legal_micro_batches, stages_of

Schedule = tuple[str, int, str]
"""(schedule, virtual stages, how long stages have their weights whole)."""
_LONG = 32768
"""Tokens of a document from which more than 8 context ranks are looked at."""


class Shape(NamedTuple):
    """A combination of axes, and how many documents a row holds."""

    tensor: int
    pipeline: int
    context: int
    replicate: int
    expert: int
    documents: int


def shapes(ranks: int, config: DeepSeekV4Config, sequence: int) -> Iterator[Shape]:
    """Every combination whose axes divide the ranks and the experts; the rest of the rules are the layout's."""
    sizes = [n for n in range(1, min(ranks, 64) + 1) if ranks % n == 0 and _smooth(n)]
    powers = [n for n in sizes if n & (n - 1) == 0]
    tensors = [n for n in powers if n <= 16 and config.o_groups % n == 0]
    contexts = [n for n in powers if n <= (64 if sequence >= _LONG else 8)]
    pipelines = [n for n in sizes if n <= config.num_hidden_layers]
    experts = [n for n in range(1, config.n_routed_experts + 1) if config.n_routed_experts % n == 0]
    for tensor, pipeline, context, replicate in product(tensors, pipelines, contexts, (1, 2, 4, 8)):
        dense, rest = divmod(ranks, pipeline * replicate)
        if rest or dense % (tensor * context):
            continue
        for expert, documents in product(experts, (1, 2, 4)):
            if dense % expert == 0:
                yield Shape(tensor, pipeline, context, replicate, expert, documents)


def schedules(pipeline: int, layers: int) -> tuple[Schedule, ...]:
    """All that a pipeline of so many ranks can run of so many layers."""
    if pipeline == 1:
        return (("1f1b", 1, "step"),)
    virtual = [v for v in (2, 3, 4, 8) if v * pipeline <= layers]
    several = tuple((name, v, "step") for name in ("interleaved", "zero_bubble") for v in virtual)
    vee: tuple[Schedule, ...] = (("zbv", 2, "step"),) if 2 * pipeline <= layers else ()
    return (("1f1b", 1, "step"), ("1f1b", 1, "micro_batch"), *several, *vee)


def legal(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """Whether the schedule can order so many micro-batches."""
    return pipeline == 1 or legal_micro_batches(schedule[0], pipeline, micro_batches)  # type: ignore[arg-type]


def parallel(shape: Shape, schedule: Schedule = ("1f1b", 1, "step")) -> ParallelConfig:
    """The shape as a recipe's section, with nothing recomputed or offloaded."""
    name, virtual, reshard = schedule
    return ParallelConfig(
        tensor=shape.tensor,
        pipeline=shape.pipeline,
        context=shape.context,
        replicate=shape.replicate,
        expert=shape.expert,
        schedule=name,
        virtual_stages=virtual,
        reshard_after=reshard,
    )


_POLICIES = tuple(product((False, True), ("none", "selective", "full")))
"""(moments on the host, what is recomputed)."""


def policies(base: ParallelConfig) -> list[ParallelConfig]:
    """With every choice of what is recomputed and offloaded; the last one needs the least memory."""
    return [_with(base, *choice) for choice in _POLICIES]


def smallest(base: ParallelConfig) -> ParallelConfig:
    """The last of these."""
    return _with(base, *_POLICIES[-1])


def _with(base: ParallelConfig, offload: bool, recompute: str) -> ParallelConfig:
    return base.model_copy(update={"recompute": recompute, "offload_optimizer": offload})


def with_a_layer_moved(
    base: ParallelConfig, counts: Sequence[int], fullest: int, emptiest: int
) -> ParallelConfig | None:
    """A layer less on one pipeline rank and one more on another; None where the first has no stage of two."""
    mine, others = (stages_of(rank, base.pipeline, len(counts), base.schedule) for rank in (fullest, emptiest))
    giver, taker = max(mine, key=lambda s: counts[s]), min(others, key=lambda s: counts[s])
    if counts[giver] < 2 or giver == taker:
        return None
    moved = list(counts)
    moved[giver] -= 1
    moved[taker] += 1
    return base.model_copy(update={"stage_layers": tuple(moved)})


def _smooth(n: int) -> bool:
    """Whether all prime factors are at most 5."""
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    return n == 1
