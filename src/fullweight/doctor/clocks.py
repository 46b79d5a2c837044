"""How far each rank's clock is from rank 0's, by messages there and back."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

_ROUNDS = 3


@dataclass(frozen=True)
class Clock:
    """Seconds ahead of rank 0's clock, and how wrong that can be: half of the quickest way there and back."""

    offset_seconds: float
    uncertainty_seconds: float


def compare_clocks() -> list[Clock]:
    """All ranks together; every rank's clock in rank order, on every rank. Host tensors, in turn with rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    clocks = [Clock(0.0, 0.0)] * size
    for other in range(1, size):
        if rank == 0:
            clocks[other] = min((_ask(other) for _ in range(_ROUNDS)), key=lambda c: c.uncertainty_seconds)
        elif rank == other:
            for _ in range(_ROUNDS):
                _answer()
    box: list[list[Clock]] = [clocks]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _ask(other: int) -> Clock:
    theirs = torch.zeros(1, dtype=torch.float64)
    begin = time.time()
    dist.send(torch.zeros(1, dtype=torch.float64), other)
    dist.recv(theirs, other)
    end = time.time()
    return Clock(float(theirs) - (begin + end) / 2, (end - begin) / 2)


def _answer() -> None:
    dist.recv(torch.zeros(1, dtype=torch.float64), 0)
    dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
