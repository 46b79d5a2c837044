"""How far a replayed state is from the recorded one, measured against how far the window moved it.

Three distances, each ||replayed - recorded|| / ||recorded - start|| over the state at the window's end, in fp64:

- **weights**: of the parameters as they are. On the same stack it is 0. On another it says little: AdamW moves an
  element whose gradient is nothing but rounding as far as any other, in a direction that rounding decides, and
  Muon does so with a matrix's weak directions.
- **effect**: of the parameters, each difference weighed by the gradient that the replay itself found there, so
  that it counts by what it does to the loss. Where AdamW steps, by the root of the second moment, element by
  element; where Muon steps, by the momentum M of each matrix: ||M^T (a - b)||, on the shorter side of M.
- **moments**: of the optimisers' moments, which are sums of gradients and hence of what was learnt from.

Tensors are read whole from the disk, whatever ranks wrote them, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Generation
from fullweight.evidence.coverage import ROUTED

_CHUNK = 1 << 22  # elements in float64 at a time


@dataclass(frozen=True)
class Ratio:
    """Squares of a difference and of what it is measured against."""

    apart: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.apart + other.apart, self.moved + other.moved)

    @property
    def value(self) -> float:
        """Root of their quotient; 0 without a difference, infinite where nothing moved."""
        if self.apart == 0:
            return 0.0
        return math.sqrt(self.apart / self.moved) if self.moved else math.inf


@dataclass(frozen=True)
class TensorDistance:
    """A tensor that is not equal bit for bit."""

    name: str
    relative: float = math.inf  # as it is
    effect: float | None = None  # weighed by the gradient; None for what no optimiser moves
    share: float = 0.0  # of the effect of all parameters: ||replayed - recorded|| over what all of them moved
    note: str | None = None  # why there are no numbers: absent on one side, another shape or dtype, no floats


@dataclass(frozen=True)
class StateDistance:
    """Tensors that differ, the model's in the order of its modules, then the rest; and all of them together."""

    tensors: tuple[TensorDistance, ...]
    weights: float
    effect: float
    moments: float


@dataclass
class _Sums:
    tensors: list[TensorDistance] = field(default_factory=list)
    weights: Ratio = Ratio()
    effect: Ratio = Ratio()
    moments: Ratio = Ratio()


def distance(
    recorded: Generation,
    replayed: Generation,
    start: Generation,
    order: Sequence[str] = (),
    matrices: Mapping[str, int] | None = None,
) -> StateDistance:
    """Compare two states of one step in this process.

    `order` is the model's own order of its tensors' names, `matrices` how many a parameter stacks (1 by default).
    """
    held = [store.contents(g) for g in (recorded, replayed, start)]
    place = {name: i for i, name in enumerate(order)}
    names = sorted(held[0].keys() | held[1].keys(), key=lambda n: (place.get(n, len(place)), n))
    # generators are drawn from by nobody, and other ranks have others; rounding may send a token to another expert
    names = [n for n in names if not n.startswith("random.") and n != ROUTED]
    both = [n for n in names if held[0].get(n) == held[1].get(n)]
    origins = store.stream(start, begun := [n for n in both if held[2].get(n) == held[0][n]])
    gradients = store.stream(replayed, [g for n in both if (g := _gradient(n, held[1]))])
    sums, known = _Sums(), set(begun)
    for (name, a), (_, b) in zip(store.stream(recorded, both), store.stream(replayed, both), strict=True):
        origin = next(origins)[1] if name in known else torch.zeros_like(a)
        gradient = next(gradients) if _gradient(name, held[1]) else None
        _add(sums, name, (a, b, origin), gradient, (matrices or {}).get(name, 1))
    lacking = [n for n in names if held[0].get(n) != held[1].get(n)]
    sums.tensors += [TensorDistance(n, note=_note(held[0].get(n), held[1].get(n))) for n in lacking]
    _set_shares(sums)
    sums.tensors.sort(key=lambda d: (place.get(d.name, len(place)), d.name))
    return StateDistance(tuple(sums.tensors), sums.weights.value, sums.effect.value, sums.moments.value)


def distance_of(
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor]], matrices: Mapping[str, int]
) -> StateDistance:
    """As `distance`, of tensors in memory by name: (recorded, replayed, start). Moments may lack some names."""
    sums = _Sums()
    for name, (recorded, replayed, origin) in tensors.items():
        moment = _gradient(name, tensors)
        gradient = None if moment is None else (moment, tensors[moment][1])
        _add(sums, name, (recorded, replayed, origin), gradient, matrices.get(name, 1))
    _set_shares(sums)
    return StateDistance(tuple(sums.tensors), sums.weights.value, sums.effect.value, sums.moments.value)


def first_beyond(found: Iterable[TensorDistance], bound: float, share: float) -> TensorDistance | None:
    """The first parameter, in their order, whose effect is not within `bound`, or a tensor that has no numbers.

    One whose share is not above `share` is passed over: all of its gradient is rounding.
    """
    for d in found:
        if d.note is not None or (d.effect is not None and not d.effect <= bound and not d.share <= share):
            return d
    return None


def _add(
    sums: _Sums,
    name: str,
    values: tuple[Tensor, Tensor, Tensor],
    gradient: tuple[str, Tensor] | None,
    num_matrices: int,
) -> None:
    """Count one tensor, given as (recorded, replayed, start), with the moment that weighs it."""
    a, b, origin = values
    if not a.is_floating_point():
        if not torch.equal(a, b):
            sums.tensors.append(TensorDistance(name, note="values that are no floats differ"))
        return
    plain = Ratio(*(_squares(a, other) for other in (b, origin)))
    effect = None
    if name.startswith("model."):
        sums.weights += plain
        if gradient is not None:
            effect = _effect(a, b, origin, *gradient, num_matrices)
            sums.effect += effect
    elif a.dim():  # counters would count as much as they are large
        sums.moments += plain
    if not torch.equal(_bits(a), _bits(b)):
        by_effect = None if effect is None else effect.value
        sums.tensors.append(TensorDistance(name, plain.value, by_effect, 0.0 if effect is None else effect.apart))


def _set_shares(sums: _Sums) -> None:
    """From squares to shares, now that the sum over all parameters is known."""
    sums.tensors = [replace(d, share=Ratio(d.share, sums.effect.moved).value) for d in sums.tensors]


def _gradient(name: str, held: Container[str]) -> str | None:
    """The moment by which a parameter's elements are weighed; None where there is none."""
    own, parameter = name.partition(".")[::2]
    if own != "model":
        return None
    wanted = (f"optimizer.adamw.{parameter}.exp_avg_sq", f"optimizer.muon.{parameter}.momentum")
    return next((moment for moment in wanted if moment in held), None)


def _effect(a: Tensor, b: Tensor, origin: Tensor, moment: str, values: Tensor, num_matrices: int) -> Ratio:
    if moment.endswith(".exp_avg_sq"):
        root = values.double().sqrt()
        return Ratio(*(_squares(a, other, root) for other in (b, origin)))
    matrices = [t.double().reshape(num_matrices, -1, t.shape[-1]) for t in (a, b, origin, values)]
    apart = moved = 0.0
    for recorded, replayed, start, momentum in zip(*matrices, strict=True):
        wide = momentum.shape[0] <= momentum.shape[1]
        gram = momentum @ momentum.T if wide else momentum.T @ momentum
        deltas = [replayed - recorded, start - recorded]
        found = [((gram @ d if wide else d @ gram) * d).sum().item() for d in deltas]
        apart, moved = apart + found[0], moved + found[1]
    return Ratio(max(apart, 0.0), max(moved, 0.0))


def _squares(a: Tensor, b: Tensor, weight: Tensor | None = None) -> float:
    """||weight (a - b)||^2 in float64, a piece at a time."""
    flat = [t.reshape(-1) for t in (a, b)]
    by = None if weight is None else weight.reshape(-1)
    total = 0.0
    for piece in _pieces(flat[0].numel()):
        delta = flat[0][piece].double() - flat[1][piece].double()
        total += (delta if by is None else delta * by[piece]).square().sum().item()
    return total


def _pieces(count: int) -> Iterator[slice]:
    for first in range(0, count, _CHUNK):
        yield slice(first, first + _CHUNK)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _note(recorded: store.Stored | None, replayed: store.Stored | None) -> str:
    if recorded is None or replayed is None:
        return "the recorded state lacks it" if recorded is None else "the replayed state lacks it"
    return f"recorded {recorded.dtype} {list(recorded.shape)}, replayed {replayed.dtype} {list(replayed.shape)}"
