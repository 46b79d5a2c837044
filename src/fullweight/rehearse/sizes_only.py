"""Torch's mode of tensors without data, with a shorter way to what it has worked out before.

A step repeats few operations on few shapes very often. What torch's own mode answers the first time, whether the
result is an argument, a view of one or a new tensor, and of what shape, is kept by operation, shapes and
constants, and made from that later. Torch's mode has such a cache too; finding the place in it takes long.

Values are all 1: what the step reads on the host is a finite loss and a norm that clips nothing.

Left out of the short way: operations outside of aten, those with tensors of another kind among their arguments,
and results that are neither dense nor a view of a dense argument. Built on torch 2.13's fake tensors, whose
attributes are copied from one to the next; torch is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU = torch.device("cpu")
# These change a tensor's storage, or tell of it what the key does not hold.
_NOT = {"set_", "resize_", "_local_scalar_dense", "is_pinned", "_pin_memory", "record_stream"}
_Made = Callable[[list[Any]], Any]


class SizesOnly(FakeTensorMode):
    """FakeTensorMode; a value that is read is 1. The shorter way is for tensors of one device."""

    def __init__(self, device: torch.device = _CPU) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = device
        self._known: dict[Hashable, _Made | None] = {}
        self._attributes: dict[str, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled; the wrapper that sees to that takes as long as the operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1
        kwargs = kwargs or {}
        tensors: list[Any] = []
        key = self._key(func, args, kwargs, tensors)
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        found = self._known.get(key)
        if found is not None:
            return found(tensors)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self._known:
            self._known[key] = self._again(result, tensors)
        return result

    def _key(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Any]
    ) -> Hashable | None:
        """What decides the result's size; None where that is not known. The tensors are put in `tensors`."""
        if func.namespace != "aten" or func._opname in _NOT:
            return None
        parts: list[Hashable] = [func]
        try:
            for arg in args:
                parts.append(_described(arg, tensors))
            for name, arg in kwargs.items():
                parts.append(name)
                parts.append(_described(arg, tensors))
            key = tuple(parts)
            hash(key)
        except TypeError:
            return None
        return key

    def _again(self, result: Any, tensors: list[Any]) -> _Made | None:
        if isinstance(result, FakeTensor):
            return self._one_again(result, tensors)
        if isinstance(result, (tuple, list)) and all(isinstance(one, FakeTensor) for one in result):
            each = [self._one_again(one, tensors) for one in result]
            kind = list if isinstance(result, list) else tuple  # of named results, too, nothing asks for the names
            return None if None in each else lambda given: kind([made(given) for made in each])  # type: ignore[misc]
        return None

    def _one_again(self, result: FakeTensor, tensors: list[Any]) -> _Made | None:
        for index, tensor in enumerate(tensors):
            if tensor is result:
                return lambda given: given[index]
        if (
            result.layout is not torch.strided
            or result.fake_device != self.device
            or result.is_conj()
            or result.is_neg()
        ):
            return None
        if not self._attributes:
            self._attributes = {**result.__dict__, "constant": None}
        shape, stride, dtype = tuple(result.shape), result.stride(), result.dtype
        offset, place = result.storage_offset(), result.untyped_storage()._cdata
        for index, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == place:
                return lambda given: self._fake(
                    torch.empty(0, dtype=dtype, device="meta").set_(
                        given[index].untyped_storage(), offset, shape, stride
                    )
                )
        num_bytes = torch.empty_strided(shape, stride, dtype=dtype, device="meta").untyped_storage().nbytes()
        if offset or result.untyped_storage().nbytes() != num_bytes:
            return None
        return lambda _: self._fake(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def _fake(self, meta: Tensor) -> Tensor:
        """What `FakeTensor(self, meta, device)` makes, without asking for each of its attributes."""
        made = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._attributes)
        return made


def _described(arg: Any, tensors: list[Any]) -> Hashable:
    """Size and kind of a tensor, type and value of a constant; TypeError for what cannot be compared."""
    kind = type(arg)
    if kind is FakeTensor:
        for index, tensor in enumerate(tensors):
            if tensor is arg:
                return index  # which of two arguments the result is must be told by the key
        tensors.append(arg)
        return tuple(arg.shape), arg.stride(), arg.storage_offset(), arg.dtype, arg.fake_device
    if kind is list or kind is tuple:
        return (kind, *[_described(one, tensors) for one in arg])
    if issubclass(kind, Tensor):
        raise TypeError
    return kind, arg
