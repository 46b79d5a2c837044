"""A short self-test of each operation of a set, on its device, beside the reference in float64 on the CPU.

Shapes are small and odd: documents of one token, lengths on both sides of windows, rows that no block divides.
A wrong kernel, driver or chip shows as an error far above rounding; speed is not looked at. `cases` covers every
method of `ReferenceOperations`, which a test makes sure of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.doctor.facts import OperationResult
from fullweight.ops.reference import Compressed, ReferenceOperations

LENGTHS, NUM_TOKENS, WINDOW = (1, 5, 41, 3, 27), 91, 8
RATIO, ENTRIES = 4, 5
_HEADS, _WIDTH, _HIDDEN, _STREAMS = 4, 512, 40, 4
_INDEX_WIDTH = 128  # these two are the model's: an accelerator's operators take no others
# Relative norms. bf16 keeps 8 bits and a result passes a handful of roundings (2^-9 each); fp32 leaves room for
# sums of a few hundred terms in any order.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Call = Callable[[ReferenceOperations, PackedLayout, Sequence[Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One call: `narrow` inputs are activations, in the dtype under test; `wide` ones stay fp32."""

    operation: str
    call: Call
    narrow: tuple[Tensor, ...]
    wide: tuple[Tensor, ...] = ()
    gradients: bool = True


def try_operations(ops: ReferenceOperations, device: torch.device) -> list[OperationResult]:
    """Each operation in fp32 and bf16, values and gradients. Raises nothing: what fails says so.

    A type that the set says it does not take is left out, unless it takes none of them.
    """
    layout, results = PackedLayout.build(LENGTHS, (RATIO,), NUM_TOKENS), []
    for case in cases(layout):
        taken, refused = [], []
        for dtype in _TOLERANCE:
            try:
                taken.append(_one(case, ops, device, layout, dtype))
            except OperationError as error:
                refused.append(OperationResult(**_told(case, dtype), failure=str(error)))
        results += taken or refused
    return results


def _told(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"operation": case.operation, "dtype": _NAMES[dtype], "tolerance": _TOLERANCE[dtype]}


def _one(
    case: Case, ops: ReferenceOperations, device: torch.device, layout: PackedLayout, dtype: torch.dtype
) -> OperationResult:
    inputs = [*(x.to(dtype) for x in case.narrow), *case.wide]
    told = _told(case, dtype)
    expected = _run(case, ReferenceOperations(), layout, [x.double() for x in inputs])
    try:
        found = _run(case, ops, layout.to(device), [x.to(device) for x in inputs])
    except OperationError:
        raise  # the set's own word on what it takes
    except (RuntimeError, ValueError, NotImplementedError) as error:  # a kernel that is missing, or refuses
        return OperationResult(**told, failure=str(error).strip().partition("\n")[0] or type(error).__name__)
    errors = [[_error(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(found, expected, strict=True)]
    if not all(math.isfinite(e) for both in errors for e in both):
        return OperationResult(**told, failure="values that are not finite, or of another shape")
    return OperationResult(**told, error=max(errors[0]), gradient_error=max(errors[1], default=None))


def _run(
    case: Case, ops: ReferenceOperations, layout: PackedLayout, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the inputs' gradients for fixed cotangents; on the host, in float64."""
    leaves = [x.detach().clone().requires_grad_(case.gradients) for x in inputs]
    outputs = [y for y in case.call(ops, layout, leaves) if y is not None]
    grads: list[Tensor] = []
    if case.gradients:
        total = sum(
            (y.float() if y.dtype != torch.float64 else y).mul(_random(*y.shape, seed=99 + i).to(y.device)).sum()
            for i, y in enumerate(outputs)
            if y.requires_grad
        )
        assert isinstance(total, Tensor)
        total.backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [y.detach().cpu().double() for y in outputs], [g.cpu().double() for g in grads]


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return math.inf
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def _turn(x: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T, pairs] for tokens of x, in fp32 or x's float64, on its device."""
    angle = torch.arange(x.shape[0]).unsqueeze(1) * torch.logspace(0, -3, pairs)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return angle.cos().to(x.device, dtype), angle.sin().to(x.device, dtype)


def _selection(layout: PackedLayout) -> Tensor:
    """Up to `ENTRIES` visible entries of each token, ascending, -1 last; on the layout's device."""
    table = layout.tables[RATIO]
    begin, end = table.entry_begin.unsqueeze(1), table.entry_end.unsqueeze(1)
    chosen = begin + 2 * torch.arange(ENTRIES, device=begin.device)
    return torch.where(chosen < end, chosen, -1)


def cases(layout: PackedLayout) -> list[Case]:
    """One or more for each operation."""
    return [*_products(), *_elementwise(), *_hyper(), *_attention(layout), *_indexer(layout), *_rest()]


def _products() -> list[Case]:
    x, w = _random(37, 24), _random(40, 24, seed=1)
    grouped, blocks = _random(33, _HEADS, 12), _random(_HEADS * 5, 12, seed=1)
    return [
        Case("linear", lambda o, _, i: [o.linear(*i)], (x,), (w,)),
        Case("wide_linear", lambda o, _, i: [o.wide_linear(*i)], (x,), (w,)),
        Case("grouped_linear", lambda o, _, i: [o.grouped_linear(*i)], (grouped,), (blocks,)),
    ]


def _elementwise() -> list[Case]:
    x, weight = _random(21, 6, 32), 1 + _random(32, seed=1, scale=0.1)
    gates = _random(13, 48, scale=2.0)
    return [
        Case("rms_norm", lambda o, _, i: [o.rms_norm(i[0], i[1], 1e-6)], (x,), (weight,)),
        Case("rotary", lambda o, _, i: [o.rotary(i[0], *_turn(i[0], 5))], (x,)),
        Case("norm_rotary", lambda o, _, i: [o.norm_rotary(i[0], i[1], 1e-6, *_turn(i[0], 5))], (x,), (weight,)),
        Case("swiglu", lambda o, _, i: [o.swiglu(i[0], 1.5)], (gates,)),
    ]


def _hyper() -> list[Case]:
    n, d, t = _STREAMS, _HIDDEN, 29
    streams, y = _random(t, n, d), _random(t, d, seed=1)
    fn, base, scale = _random((2 + n) * n, n * d, scale=0.1), _random((2 + n) * n, seed=2), _random(3, seed=3)
    post, comb = _random(t, n, seed=4), torch.softmax(_random(t, n, n, seed=5), -1)

    def pre(o: ReferenceOperations, _: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        out = o.hyper_pre(i[0], i[1], i[2], i[3], 20, 1e-6, 1e-6)
        return [out.input, out.post, out.comb]

    return [
        Case("hyper_pre", pre, (streams,), (fn, base, scale)),
        Case("sinkhorn", lambda o, _, i: [o.sinkhorn(i[0], 20, 1e-6)], (), (_random(t, n, n, seed=6),)),
        Case("hyper_post", lambda o, _, i: [o.hyper_post(*i)], (streams, y), (post, comb)),
        Case(
            "hyper_head",
            lambda o, _, i: [o.hyper_head(i[0], i[1], i[2], i[3], 1e-6, 1e-6)],
            (streams,),
            (fn[:n].clone(), base[:n].clone(), scale[:1].clone()),
        ),
        Case("hyper_mix", lambda o, _, i: [o.hyper_mix(*i)], (streams,), (post,)),
    ]


def _attention(layout: PackedLayout) -> list[Case]:
    t, e = layout.num_tokens, layout.num_tokens // RATIO
    q, kv = _random(t, _HEADS, _WIDTH), _random(t, _WIDTH, seed=1)
    entries, sink = _random(e, _WIDTH, seed=2), _random(_HEADS, seed=3)

    def plain(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        out = o.attention(i[0], i[1], i[2], at, WINDOW, _turn(i[0], 5))
        return [out.out, out.lse]

    def over(selected: bool) -> Call:
        def call(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
            chosen = _selection(at) if selected else None
            compressed = Compressed(i[2], at.tables[RATIO], chosen)
            out = o.attention(i[0], i[1], i[3], at, WINDOW, _turn(i[0], 5), compressed)
            return [out.out, out.lse] if out.mass is None else [out.out, out.lse, out.mass]

        return call

    def compressing(overlap: bool) -> Call:
        def call(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
            table = at.tables[RATIO]
            return [o.compress(i[0], i[1], i[2], table, overlap)[: int(table.entry_end.max())]]

        return call

    values, gates = _random(t, 2 * _WIDTH), _random(t, 2 * _WIDTH, seed=1)
    ape = _random(RATIO, 2 * _WIDTH, seed=2)
    return [
        Case("attention", plain, (q, kv), (sink,)),
        Case("attention over entries", over(False), (q, kv, entries), (sink,)),
        Case("attention over selected entries", over(True), (q, kv, entries), (sink,)),
        Case("compress", compressing(False), (), (values, gates, ape)),
        Case("compress with overlap", compressing(True), (), (values, gates, ape)),
    ]


def _indexer(layout: PackedLayout) -> list[Case]:
    t, e = layout.num_tokens, layout.num_tokens // RATIO
    # whole numbers, exact in every dtype: the choice must be the same, ties to the lower index
    whole = [
        x.round() for x in (_random(t, 3, _INDEX_WIDTH), _random(e, _INDEX_WIDTH, seed=1), _random(t, 3, seed=2))
    ]
    small = _INDEX_WIDTH**-0.25  # scores of about one
    queries = _random(t, 3, _INDEX_WIDTH, scale=small)
    keys = _random(e, _INDEX_WIDTH, seed=1, scale=small)
    weights = _random(t, 3, seed=2)
    q, entries = _random(t, _HEADS, _WIDTH), _random(e, _WIDTH, seed=2)
    real = t - 11

    def scores(o: ReferenceOperations, _: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        return [o.index_scores(*i)]

    def select(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        return [o.select_entries(i[0], i[1], i[2], at.tables[RATIO], ENTRIES)]

    def loss(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        selected = _selection(at)
        mass = (1.0 + selected.clamp(min=0) % 3).to(i[2].dtype) * (selected >= 0)
        return [o.indexer_loss(i[0], i[1], i[2], selected, mass, real)]

    def dense(o: ReferenceOperations, at: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        query, kept, narrow = i[0], i[1], i[2].detach()
        compressed = Compressed(i[3].detach(), at.tables[RATIO])
        lse = i[5].detach() + 6.0
        return [o.dense_indexer_loss(query, kept, i[4], narrow, lse, compressed, real)]

    lse = _random(t, _HEADS, seed=7, scale=0.1)
    return [
        Case("index_scores", scores, (queries, keys), (weights,)),
        Case("select_entries", select, (whole[0], whole[1]), (whole[2],), gradients=False),
        Case("indexer_loss", loss, (queries, keys), (weights,)),
        Case("dense_indexer_loss", dense, (queries, keys, q, entries), (weights, lse)),
    ]


def _rest() -> list[Case]:
    experts, inner, top, t = 5, 24, 2, 23  # widths in eighths, which grouped products ask for
    x, head_in = _random(t, _HIDDEN), _random(t, _HIDDEN, seed=5)
    gate_up, down = _random(experts, 2 * inner, _HIDDEN, scale=0.2), _random(experts, _HIDDEN, inner, seed=1)
    weights = torch.softmax(_random(t, top, seed=2), -1)
    head, loss_weights = _random(61, _HIDDEN, seed=3, scale=0.2), _random(t, seed=4).abs()

    def mixture(o: ReferenceOperations, _: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        first = torch.arange(t, device=i[0].device) % (experts - 1)  # the last expert gets a share, one gets none
        chosen = torch.stack((first, torch.where(first == 0, experts - 1, (first + 1) % 3)), 1)
        return [o.experts(i[0], chosen, i[1], i[2], i[3], 6.0)]  # few values near the limit's jump

    def entropy(o: ReferenceOperations, _: PackedLayout, i: Sequence[Any]) -> Sequence[Tensor]:
        targets = torch.arange(t, device=i[0].device) * 7 % 61
        return list(o.cross_entropy(i[0], i[1], targets, i[2].detach()))

    return [
        Case("experts", mixture, (x,), (weights, gate_up, down)),
        Case("cross_entropy", entropy, (head_in,), (head, loss_weights)),
    ]
