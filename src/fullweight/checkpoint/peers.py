"""The ranks that write or read one checkpoint together, and how they agree on failure.

A checkpoint is whole only if every rank did its part, so every part ends with all ranks knowing whether all of
them succeeded: none goes on alone, none waits for one that gave up. Alone, each agreement is the identity. The
background writer has a process group of its own, so that its messages never mix with those of training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from fullweight.core.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    reason: str
    kind: type[CheckpointError]


@dataclass(frozen=True)
class Peers:
    """The members of `group` (None: all ranks, or this process alone when there is no process group)."""

    group: dist.ProcessGroup | None = None

    @classmethod
    def of_their_own(cls) -> Peers:
        """All ranks in a new group over host memory; all ranks must call it together."""
        return cls(dist.new_group(backend="gloo") if dist.is_initialized() else None)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_threads(self) -> int:
        """Threads that this rank may use beside those of its neighbours on the same machine, at most 8."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable `value` in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; its results in rank order, or an error on every rank if any failed.

        The rank that failed raises its own error, the others a CheckpointError (of its kind) that names it.
        """
        own: Exception | None = None
        result: T | _Failed
        try:
            result = work()
        except Exception as error:
            kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
            own, result = error, _Failed(str(error), kind)
        everyone = self.gather(result)
        if own is not None:
            raise own
        for rank, value in enumerate(everyone):
            if isinstance(value, _Failed):
                raise value.kind(f"rank {rank}: {value.reason}")
        return everyone  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; its result on every rank, or its error."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]
