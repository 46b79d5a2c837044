"""How two generations differ: which tensors, by how much, and what else.

Tensors are compared whole, whatever number of ranks wrote them, a bounded number of bytes at a time, bit by bit:
equal NaNs are equal, zeros of different sign are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Facts, Generation
from fullweight.checkpoint.store import Stored

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """A name under which the two sides do not hold the same bits."""

    name: str
    note: str | None = None  # why elements cannot be compared: absent on one side, another shape or dtype
    num_elements: int = 0
    num_changed: int = 0
    max_absolute: float = 0.0
    relative: float = 0.0  # ||b - a|| / ||a||, in float64; infinite where a is zero


@dataclass(frozen=True)
class Comparison:
    """Everything in which generation b differs from generation a."""

    num_tensors: int  # names on either side
    tensors: list[TensorDifference]
    facts: dict[str, tuple[Any, Any]]  # by dotted name: step, model, configuration, ranks, position, versions

    @property
    def same_state(self) -> bool:
        """Whether every tensor and every counter is equal bit for bit; ranks and versions may differ."""
        return not self.tensors and not any(name.startswith(("step", "position", "model")) for name in self.facts)


def compare(a: Generation, b: Generation, prefix: str = "") -> Comparison:
    """Compare two verified generations, or their tensors under `prefix`, without building a model."""
    held = store.contents(a), store.contents(b)
    names = sorted(name for name in held[0].keys() | held[1].keys() if name.startswith(prefix))
    differences, comparable = [], []
    for name in names:
        note = _not_comparable(held[0].get(name), held[1].get(name))
        if note is None:
            comparable.append(name)
        else:
            differences.append(TensorDifference(name, note))
    for (name, left), (_, right) in zip(store.stream(a, comparable), store.stream(b, comparable), strict=True):
        if (found := difference(name, left, right)) is not None:
            differences.append(found)
    return Comparison(len(names), differences, _facts(a.manifest.facts, b.manifest.facts))


def difference(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """How two tensors of one shape and dtype differ, or None when every bit is equal."""
    bits = _BITS[a.element_size()]
    changed = int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())
    if not changed:
        return None
    x, y = a.double(), b.double()
    delta, size = (y - x).norm().item(), x.norm().item()
    return TensorDifference(
        name,
        num_elements=a.numel(),
        num_changed=changed,
        max_absolute=(y - x).abs().max().item(),
        relative=delta / size if size else float("inf") if delta else 0.0,
    )


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ between two nested dicts, by dotted name; None where one side has none."""
    left, right = flattened(a), flattened(b)
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    }


def _facts(a: Facts, b: Facts) -> dict[str, tuple[Any, Any]]:
    return changes(*(facts.model_dump(mode="json", exclude={"ledger"}) for facts in (a, b)))


def _not_comparable(a: Stored | None, b: Stored | None) -> str | None:
    if a is None or b is None:
        return "only in the second" if a is None else "only in the first"
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    return f"{a.dtype} and {b.dtype}" if a.dtype != b.dtype else None
