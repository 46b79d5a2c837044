"""Moments that live in host memory and visit the device a bucket at a time, while the bucket before is updated.

Between steps a device holds no moments at all. In a step the buckets (`buckets.py`) are brought in turn: while one
is updated, by the very optimiser, restricted to it, the next one travels in and the one before travels out. At
most two are on the device, whatever the size of the model. The arithmetic is that of the optimiser without
offload, which takes AdamW entry by entry and Muon by the same buckets, so the bits are equal.

On an accelerator moments are pinned and travel on a stream of their own. Whatever is brought is allocated on that
stream, on which its way out precedes the next bucket's way in, so the allocator gives one bucket's memory to the
next without waiting. Counters stay on the device. On a CPU, where host and device are one, copies are plain ones:
this only serves to check the bookkeeping, and nothing is saved.

Left out: gradients and weights on the host. The stream's path (`StreamCopies`) has not run: no machine with an
accelerator was at hand; the order of its operations is the one that is tested with plain copies. torch rounds
pinned allocations up to powers of two unless PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1 is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.core.tensors import local_part
from fullweight.devices import separate
from fullweight.optim.adamw import AdamW
from fullweight.optim.buckets import buckets
from fullweight.optim.muon import Muon


class Copies:
    """Plain copies, where the device is the host. The calls for each bucket are bring, wait, leave, in this order.

    The next bucket's `bring` comes between a bucket's `wait` and its `leave`.
    """

    def bring(self, host: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy onto the device."""
        return [tensor.clone() for tensor in host]

    def wait(self) -> None:
        """What is done on the device from now on comes after what the last `bring` began."""

    def leave(self, device: Sequence[Tensor], host: Sequence[Tensor], fresh: bool) -> None:
        """Begin to copy back; `fresh`: some tensors were made by the optimiser and not brought."""
        for source, target in zip(device, host, strict=True):
            target.copy_(source)

    def finish(self) -> None:
        """Return when all of it is in host memory."""


class StreamCopies(Copies):
    """Copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.Stream(device)
        self.arrived = torch.Event(device)

    def bring(self, host: Sequence[Tensor]) -> list[Tensor]:
        with self.side:
            moved = [tensor.to(self.device, non_blocking=True) for tensor in host]
        self.arrived.record(self.side)
        return moved

    def wait(self) -> None:
        torch.accelerator.current_stream(self.device).wait_event(self.arrived)

    def leave(self, device: Sequence[Tensor], host: Sequence[Tensor], fresh: bool) -> None:
        computing = torch.accelerator.current_stream(self.device)
        self.side.wait_stream(computing)
        with self.side:
            for source, target in zip(device, host, strict=True):
                target.copy_(source, non_blocking=True)
        if fresh:  # their memory belongs to the computing stream, which must not use it again too early
            computing.wait_stream(self.side)

    def finish(self) -> None:
        self.side.synchronize()


class HostMoments(torch.optim.Optimizer):
    """A base to put before an optimiser's; moments, tensors of `state` with dimensions, are on the host."""

    copies: Copies | None = None  # made at the first step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; all moments are in host memory when it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        all_buckets = ([p for _, p in bucket if p.grad is not None] for bucket in buckets(self.param_groups))
        waiting = [bucket for bucket in all_buckets if bucket]
        if not waiting:
            return loss
        copies = self.copies = self.copies or _copies(waiting[0][0].device)
        homes = self._bring(waiting[0], copies)
        for bucket, following in zip(waiting, [*waiting[1:], []], strict=True):
            copies.wait()
            homes_of_following = self._bring(following, copies) if following else {}
            with self._only(bucket):
                super().step()
            self._leave(bucket, homes, copies)
            homes = homes_of_following
        copies.finish()
        return loss

    def _bring(self, bucket: list[Tensor], copies: Copies) -> dict[tuple[Tensor, str], Tensor]:
        """Moments of the bucket that are on the host go to the device; returns where each came from."""
        homes = {(p, key): m for p in bucket for key, m in self._moments(p).items() if not _on_device(m, p)}
        for (place, home), moved in zip(
            homes.items(), copies.bring([*map(local_part, homes.values())]), strict=True
        ):
            parameter, key = place
            self.state[parameter][key] = _like(home, moved)
        return homes

    def _leave(self, bucket: list[Tensor], homes: dict[tuple[Tensor, str], Tensor], copies: Copies) -> None:
        """All moments of the bucket go to the host, each to where it came from."""
        here = {(p, key): moment for p in bucket for key, moment in self._moments(p).items()}
        targets = {place: homes[place] if place in homes else host_like(m) for place, m in here.items()}
        fresh = here.keys() != homes.keys()
        copies.leave([*map(local_part, here.values())], [*map(local_part, targets.values())], fresh)
        for (parameter, key), target in targets.items():
            self.state[parameter][key] = target

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Any] = self.state.get(parameter, {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}

    @contextmanager
    def _only(self, bucket: list[Tensor]) -> Iterator[None]:
        """Within it the optimiser has no other parameters."""
        every, chosen = [group["params"] for group in self.param_groups], set(bucket)
        for group, parameters in zip(self.param_groups, every, strict=True):
            group["params"] = [p for p in parameters if p in chosen]
        try:
            yield
        finally:
            for group, parameters in zip(self.param_groups, every, strict=True):
                group["params"] = parameters


class HostMuon(HostMoments, Muon):  # type: ignore[misc]  # Muon's step is overloaded
    """Muon with its momentum in host memory."""


class HostAdamW(HostMoments, AdamW):
    """AdamW with both moments in host memory."""


def host_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's tensors of an optimiser's state that take no memory of the device; none without offload."""
    if not isinstance(optimizer, HostMoments):
        return []
    values = (value for state in optimizer.state.values() for value in state.values())
    # `to_local` would be an operation: whoever watches those would meet the tensor before it is told of it
    parts = (value._local_tensor if isinstance(value, DTensor) else value for value in values)
    return [part for part in parts if isinstance(part, Tensor) and part.dim() > 0]


def moment_like(optimizer: torch.optim.Optimizer, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty moment of `parameter`, shaped and sharded like it, where the optimiser keeps its moments."""
    if isinstance(optimizer, HostMoments):
        return host_like(parameter, dtype)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def host_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty host memory, pinned beside an accelerator, of a tensor's shape; sharded like it."""
    local = local_part(tensor).detach()
    empty = torch.empty_like(local, dtype=dtype, device="cpu", pin_memory=separate(local.device))
    return _like(tensor, empty)


def _copies(device: torch.device) -> Copies:
    return StreamCopies(device) if separate(device) else Copies()


def _on_device(moment: Tensor, parameter: Tensor) -> bool:
    """Whether a moment is where its parameter is, as after `load_state_dict`; never where that is the host."""
    device = local_part(parameter).device
    return separate(device) and local_part(moment).device == device


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of what `tensor` is."""
    if not isinstance(tensor, DTensor):
        return local
    # not `from_local`: it would move the part to the mesh's device
    return DTensor(local, tensor._spec, requires_grad=False)
