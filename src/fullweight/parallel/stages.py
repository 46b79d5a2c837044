"""Where a pipeline is cut and who runs what: arithmetic, without torch.

Layers cost differently (attention kinds, and the head and MTP layer behind the last one), so the cuts that make
the dearest stage cheapest rarely give every stage as many layers. A stage's cost is its forward FLOPs for one
document that fills the row (`flops.layer_flops`); backward is about twice that in every block alike. The
embedding, a lookup, costs nothing.

Several stages on a rank are dealt out in turn (stage s on rank s mod ranks); the V-shaped schedule goes down the
ranks and back up, so that the first rank holds the first and the last stage.

Left out: cuts by measured times or by memory; `parallel.stage_layers` says them by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import layer_flops

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv"]


def balanced_layers(config: DeepSeekV4Config, num_stages: int, row_tokens: int) -> tuple[int, ...]:
    """Main layers of each stage, at least one, such that the dearest stage is as cheap as it can be."""
    layers, rest = layer_flops(config, [row_tokens])
    return cut([*layers[:-1], layers[-1] + rest], num_stages)


def cut(costs: Sequence[int], num_parts: int) -> tuple[int, ...]:
    """Sizes of the `num_parts` runs of `costs`, none empty, whose dearest is cheapest; of equals the later larger.

    >>> cut([1, 1, 1, 1, 3], 2)
    (3, 2)
    """
    assert 0 < num_parts <= len(costs), f"{len(costs)} layers in {num_parts} stages"
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[i]: (the dearest run, sizes) of the first i costs in as many runs as the round says
    best: dict[int, tuple[int, tuple[int, ...]]] = {i: (total[i], (i,)) for i in range(1, len(costs) + 1)}
    for part in range(2, num_parts + 1):
        best = {
            i: min((max(best[j][0], total[i] - total[j]), (*best[j][1], i - j)) for j in range(part - 1, i))
            for i in range(part, len(costs) + 1)
        }
    return best[len(costs)][1]


def rank_of(stage: int, num_ranks: int, schedule: Schedule) -> int:
    """The pipeline rank that holds a stage.

    >>> [rank_of(stage, 2, "zbv") for stage in range(4)], [rank_of(stage, 2, "interleaved") for stage in range(4)]
    ([0, 1, 1, 0], [0, 1, 0, 1])
    """
    place = stage % num_ranks
    return num_ranks - 1 - place if schedule == "zbv" and stage // num_ranks % 2 else place


def stages_of(rank: int, num_ranks: int, num_stages: int, schedule: Schedule) -> tuple[int, ...]:
    """The stages that a pipeline rank holds, in order."""
    return tuple(stage for stage in range(num_stages) if rank_of(stage, num_ranks, schedule) == rank)


def legal_micro_batches(schedule: Schedule, num_ranks: int, micro_batches: int) -> bool:
    """Whether a schedule can order so many micro-batches.

    Interleaved schedules take them in rounds of equal size, each of at least as many as there are ranks.
    """
    rounds = micro_batches // num_ranks
    return rounds > 0 and (schedule in {"1f1b", "zbv"} or micro_batches % rounds == 0)
