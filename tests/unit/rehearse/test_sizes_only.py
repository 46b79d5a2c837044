"""Tensors without data answer like torch's own, at first and from then on; shapes of wholes take no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fullweight.rehearse.sizes_only import SizesOnly
from fullweight.rehearse.tracer import Tracer

SIDE = 6
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda a, b: a + b,
    "promoted": lambda a, b: (a.int() * 1, a.int() * 1.0, a.int() * True),
    "product": lambda a, b: a @ b,
    "view": lambda a, b: a[2:].t().unsqueeze(1),
    "view of a view": lambda a, b: a[1:].reshape(-1)[3:9].view(torch.int32),
    "several views": lambda a, b: (*a.split([2, 4]), *b.unbind(1)),
    "in place": lambda a, b: a.add_(b).mul_(a),
    "into itself": lambda a, b: torch.mm(b, b, out=b),
    "into another": lambda a, b: torch.mm(b, b, out=a),
    "no copy": lambda a, b: (a.contiguous(), a.to(torch.float32), b.t().contiguous()),
    "dtype": lambda a, b: (a.bfloat16(), b.double()),
    "choice": lambda a, b: (a.topk(2), a.sort(0), a[b[:, 0].long()]),
    "new": lambda a, b: (a.new_empty(3, 0), torch.zeros(2, 3), torch.full((2,), 1), torch.arange(5)),
    "strided": lambda a, b: (a.as_strided((2, 3), (3, 1), 4), torch.empty_like(a.t()), a[:, ::2] + 1),
}


def seen(value: Any, arguments: tuple[Tensor, Tensor]) -> Any:
    """Size, kind and place of every tensor in a result."""
    if not isinstance(value, Tensor):
        return type(value), [seen(one, arguments) for one in value]
    shares = [value.untyped_storage()._cdata == a.untyped_storage()._cdata for a in arguments]
    same = [value is a for a in arguments]
    size = value.untyped_storage().nbytes()
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, shares, same, size


@pytest.mark.parametrize("name", OPERATIONS)
def test_answers_are_those_of_torch(name: str) -> None:
    """The second and third answers come the short way."""
    found = []
    for mode in (FakeTensorMode(), *[SizesOnly()] * 3):
        with mode:
            arguments = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
            found.append(seen(OPERATIONS[name](*arguments), arguments))
    assert found[1:] == [found[0]] * 3


def test_a_gradient_comes_the_short_way_too() -> None:
    with SizesOnly():
        for _ in range(2):
            a = torch.ones(SIDE, SIDE, requires_grad=True)
            (a[1:] @ a).relu().sum().backward()
            assert a.grad is not None
            assert a.grad.shape == a.shape
            assert a.sum().item() == 1.0


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", [SizesOnly, None])
def test_shapes_of_whole_tensors_take_no_memory(alone: None, mode: type[SizesOnly] | None) -> None:
    """DTensor learns the shape of a sum from tensors of the whole's: 64 times what a rank has."""
    rows, columns = 3, 11 if mode is None else 13  # unlike shapes: what DTensor has learnt is kept
    mesh = init_device_mesh("cpu", (64,))

    def added() -> int:
        part = DTensor.from_local(torch.ones(rows, columns), mesh, [Shard(0)], run_check=False)
        with (tracer := Tracer()):
            whole = part + part
        assert whole.shape == (64 * rows, columns)
        return int(tracer.timeline().total.max())

    if mode is None:
        assert added() == 4 * rows * columns
    else:
        with mode():
            assert added() == 4 * rows * columns
