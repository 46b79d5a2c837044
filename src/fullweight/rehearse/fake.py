"""Tensors without data in place of a machine with thousands of ranks.

`fake_ranks` joins a process group whose collectives do nothing; `reading_ones` lets the step's own code read
values on the host (norms, counts, verdicts): every such value is 1, so that a finite loss is seen and the step is
applied. Sizes that depend on values do not come from there but from `routing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # what collectives give for tensors without data
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from fullweight.core.config import nearest
from fullweight.core.errors import ConfigError
from fullweight.devices import DEVICES
from fullweight.parallel.config import Layout
from fullweight.parallel.mesh import Ranks

T = TypeVar("T")
_CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device of a rehearsal, by its name in recipes or in torch; its library is loaded, it need not be there.

    Raises ConfigError when there is no such device, or its library is absent.
    """
    known = {word: kind for recipe_name, kind in DEVICES.items() for word in (recipe_name, kind.type)}
    if name not in known:
        raise ConfigError(f"no device named {name!r}; {nearest(name, list(known))}")
    reason = known[name].available()
    if reason is not None:
        raise ConfigError(f"nothing can be traced on {name!r}: {reason}")
    kind = known[name]()
    device = kind.device(0)
    kind.synchronize()  # makes it this process's device: a mesh would otherwise choose another one
    return device


@contextmanager
def fake_ranks(rank: int, layout: Layout, device: torch.device = _CPU) -> Iterator[Ranks]:
    """This process as one rank of many that are not there; meshes are built. One at a time in a process."""
    backend = ",".join(f"{kind}:fake" for kind in dict.fromkeys([_CPU.type, device.type]))
    dist.init_process_group(backend, rank=rank, world_size=layout.world, store=FakeStore())
    original = schedules._batch_p2p
    schedules._batch_p2p = lambda ops, desc=None: [_Held(original(ops, desc), ops)]  # type: ignore[assignment, list-item]
    try:
        yield Ranks(rank, layout.world, device).laid_out(layout)
    finally:
        schedules._batch_p2p = original
        dist.destroy_process_group()


class _Held:
    """Sends and receives under way: as real ones do, they keep their tensors until the schedule drops them."""

    def __init__(self, works: list[dist.Work], operations: list[dist.P2POp]) -> None:
        self.works, self.tensors = works, [operation.tensor for operation in operations]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def without_data(value: T, mode: FakeTensorMode) -> T:
    """The same tensor, dict or dataclass of tensors, without data."""
    made: Any = value
    if isinstance(value, Tensor):
        made = mode.from_tensor(value)
    elif isinstance(value, dict):
        made = {key: without_data(item, mode) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{f.name: without_data(getattr(value, f.name), mode) for f in fields(value)})
    return made


@contextmanager
def reading_ones() -> Iterator[None]:
    """Inside it a list read from a tensor without data is of ones, as single values are (`sizes_only.py`)."""
    original = torch.Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return original(tensor)
        one: Any = 1.0 if tensor.dtype.is_floating_point else 1
        for size in reversed(tensor.shape):
            one = [one] * size
        return one

    torch.Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.tolist = original  # type: ignore[method-assign]
