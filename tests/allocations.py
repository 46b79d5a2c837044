"""Bytes of tensor storage that some work holds at once: counted, not read off the process, so every run agrees."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fullweight.core.tensors import local_part


class Allocations(TorchDispatchMode):
    """Within it, `live` bytes of storages made and not yet freed, and their `peak`; meta tensors hold none.

    `there` are tensors that existed before and do not count.
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.live = self.peak = 0
        for tensor in there:
            self._meet(local_part(tensor).untyped_storage())
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._meet(local_part(leaf).untyped_storage())  # a DTensor's own claims the bytes of the whole
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
