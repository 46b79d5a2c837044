"""A short self-test of each collective over all ranks: right values on every rank, and bandwidth.

Values are whole numbers that every rank can work out for itself, so a result is right or wrong. Bandwidth is bus
bandwidth, bytes that one rank must send over the time of the slowest rank, so that it can be laid beside a link's.
The best of a few rounds is told: a busy machine makes it slower, nothing makes it faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fullweight.devices import Device
from fullweight.doctor.facts import CollectiveResult

_ROUNDS = 3


@dataclass(frozen=True)
class Collective:
    """`call(*tensors)` is what is timed; afterwards the last tensor must equal `expected()`.

    `make` gives fresh tensors; a rank sends `share` of the message's bytes.
    """

    name: str
    make: Callable[[], list[Tensor]]
    call: Callable[..., object]
    expected: Callable[[], Tensor]
    share: float


def try_collectives(
    device: Device, place: torch.device, group: ProcessGroup | None = None, num_elements: int = 1 << 20
) -> list[CollectiveResult]:
    """All ranks together, on tensors of about 4 * `num_elements` bytes; the same results on every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    part = max(1, num_elements // size)
    trials = _collectives(place, group, rank, size, part)
    return [_measure(c, device, place, part * size * 4) for c in trials]


def _collectives(
    place: torch.device, group: ProcessGroup | None, rank: int, size: int, part: int
) -> list[Collective]:
    total = part * size

    def filled(value: float, count: int) -> Tensor:
        return torch.full((count,), float(value), device=place)

    def blocks(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=place).repeat_interleave(part)

    def gather(mine: Tensor, out: Tensor) -> None:
        dist.all_gather_single(out, mine, group=group)

    def scatter(all_parts: Tensor, out: Tensor) -> None:
        dist.reduce_scatter_single(out, all_parts, group=group)

    def exchange(all_parts: Tensor, out: Tensor) -> None:
        dist.all_to_all_single(out, all_parts, group=group)

    def pass_on(mine: Tensor, out: Tensor) -> None:
        after, before = (rank + 1) % size, (rank - 1) % size
        calls = [dist.P2POp(dist.isend, mine, after, group), dist.P2POp(dist.irecv, out, before, group)]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    others, pairs = (size - 1) / size, size * (size - 1) // 2
    sums = size * (size + 1) // 2
    return [
        Collective(
            "all_reduce",
            lambda: [filled(rank + 1, total)],
            lambda x: dist.all_reduce(x, group=group),
            lambda: filled(sums, total),
            2 * others,
        ),
        Collective(
            "all_gather",
            lambda: [filled(rank, part), filled(-1, total)],
            gather,
            lambda: blocks(list(range(size))),
            others,
        ),
        Collective(
            "reduce_scatter",
            lambda: [blocks([rank + r for r in range(size)]), filled(-1, part)],
            scatter,
            lambda: filled(pairs + size * rank, part),
            others,
        ),
        Collective(
            "all_to_all",
            lambda: [blocks([rank * size + r for r in range(size)]), filled(-1, total)],
            exchange,
            lambda: blocks([r * size + rank for r in range(size)]),
            others,
        ),
        Collective(
            "broadcast",
            lambda: [filled(7 if rank == size - 1 else -1, total)],
            lambda x: dist.broadcast(x, size - 1, group),
            lambda: filled(7, total),
            1.0,
        ),
        Collective(
            "send and receive",
            lambda: [filled(rank, total), filled(-1, total)],
            pass_on,
            lambda: filled((rank - 1) % size, total),
            1.0,
        ),
    ]


def _measure(collective: Collective, device: Device, place: torch.device, message: int) -> CollectiveResult:
    seconds, right, failure = [], True, None
    for _ in range(_ROUNDS):
        tensors = collective.make()
        device.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        try:
            collective.call(*tensors)
            device.synchronize()
        except (RuntimeError, ValueError) as error:
            failure = str(error).strip().partition("\n")[0]
            break
        seconds.append(time.perf_counter() - begin)
        right = right and torch.equal(tensors[-1], collective.expected())
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (right and failure is None, failure, min(seconds, default=0.0)))
    slowest = max(v[2] for v in told)
    wrong = [rank for rank, v in enumerate(told) if not v[0]]
    why = next((v[1] for v in told if v[1]), None) or (f"wrong values on rank(s) {wrong[:8]}" if wrong else None)
    return CollectiveResult(
        collective=collective.name,
        device=place.type,
        message_bytes=message,
        correct=not wrong,
        gigabytes_per_second=message * collective.share / slowest / 1e9 if slowest > 0 and not wrong else None,
        failure=why,
    )
