"""Tensors that ranks hold in parts, read on the first rank a piece at a time.

Each rank says which block of each tensor it holds; of equal blocks the first rank's counts. Rank 0 then asks for
pieces, and whoever holds some of one sends it straight there: however the parts are cut (rows, columns, experts,
stages of a pipeline), nobody ever has more than a piece beyond its own part. Alone, a piece is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.slices import Slice

Box = tuple[tuple[int, int], ...]
"""First and last index (exclusive) in each dim."""

_DIMS = 3  # the most that a model's tensor has
_END = -1


@dataclass(frozen=True)
class Whole:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def box(self) -> Box:
        return tuple((0, size) for size in self.shape)


class WholeTensors:
    """Named tensors (plain, or DTensors) of all `peers`; None: of this process alone. All ranks make it together.

    `known` has every name on any rank, those of rank 0 first. Only within `drive` can pieces be read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], peers: Peers | None = None) -> None:
        self._peers = peers
        self._own = {name: Slice.of(tensor.detach()) for name, tensor in tensors.items()}
        mine = [(name, held.shape, held.tensor.dtype, _box(held)) for name, held in self._own.items()]
        everyone = [mine] if peers is None else peers.gather(mine)
        self.known: dict[str, Whole] = {}
        self._holders: dict[str, dict[Box, int]] = {}
        for rank, held in enumerate(everyone):
            for name, shape, dtype, box in held:
                self.known.setdefault(name, Whole(shape, dtype))
                if all(first < last for first, last in box):
                    self._holders.setdefault(name, {}).setdefault(box, rank)
        self._names = list(self.known)

    @property
    def is_main(self) -> bool:
        return self._peers is None or self._peers.is_main

    def drive(self, work: Callable[[], Any]) -> None:
        """Run `work`, which may `read`, on rank 0, while the others send it what they hold; all ranks together.

        Raises its error on rank 0, and on the others a CheckpointError that repeats it.
        """
        if self._peers is None:
            work()
            return
        self._peers.together(lambda: self._lead(work) if self.is_main else self._serve())

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A piece of a tensor (all of it by default) on the host, in its dtype; rank 0 within `drive`."""
        box = self.known[name].box if box is None else box
        if self._peers is None or self._peers.size == 1:
            return self._local(name, box).cpu()
        self._send_request([self._names.index(name), *(index for pair in box for index in pair)])
        piece = torch.empty([last - first for first, last in box], dtype=self.known[name].dtype)
        for held, rank in self._holders[name].items():
            shared = _overlap(held, box)
            if shared is None:
                continue
            target = piece[_within(shared, box)]
            if rank == 0:
                target.copy_(self._local(name, shared))
            else:
                buffer = target if target.is_contiguous() else torch.empty_like(target)
                dist.recv(buffer, rank, group=self._peers.group)
                if buffer is not target:
                    target.copy_(buffer)
        return piece

    def _lead(self, work: Callable[[], Any]) -> None:
        try:
            work()
        finally:
            self._send_request([_END])

    def _serve(self) -> None:
        assert self._peers is not None
        while True:
            request = torch.empty(1 + 2 * _DIMS, dtype=torch.int64)
            dist.broadcast(request, 0, group=self._peers.group)
            index, *numbers = request.tolist()
            if index == _END:
                return
            name = self._names[index]
            dims = len(self.known[name].shape)
            box = tuple((numbers[2 * dim], numbers[2 * dim + 1]) for dim in range(dims))
            for held, rank in self._holders[name].items():
                shared = _overlap(held, box)
                if rank == self._peers.rank and shared is not None:
                    dist.send(self._local(name, shared).cpu().contiguous(), 0, group=self._peers.group)

    def _send_request(self, numbers: list[int]) -> None:
        if self._peers is not None and self._peers.size > 1:
            request = torch.tensor([*numbers, *[0] * (1 + 2 * _DIMS - len(numbers))], dtype=torch.int64)
            dist.broadcast(request, 0, group=self._peers.group)

    def _local(self, name: str, box: Box) -> Tensor:
        held = self._own[name]
        return held.tensor[_within(box, _box(held))]


def whole_tensors(tensors: Mapping[str, Tensor], peers: Peers, take: Callable[[str, Tensor], Any]) -> None:
    """Hand each whole tensor to `take` on rank 0, one after the other in order; all ranks together."""
    whole = WholeTensors(tensors, peers)

    def hand_over() -> None:
        for name in whole.known:
            take(name, whole.read(name))

    whole.drive(hand_over)


def _box(held: Slice) -> Box:
    return tuple((o, o + n) for o, n in zip(held.offset, held.tensor.shape, strict=True))


def _overlap(one: Box, other: Box) -> Box | None:
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(first < last for first, last in shared) else None


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True))
