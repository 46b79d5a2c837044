"""The Ascend operations against the reference, with torch_npu's operators emulated from their documentation.

Everything is float64 on both sides, so that only a difference of meaning is left: a rotary mode, a
transposition, a clamp, a scale, a sign. Each mutation below wires one of them wrongly and has to be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ascend.emulated import install
from torch import Tensor

from fullweight.core.slicing import Slice, slice_layout
from fullweight.core.types import PackedLayout
from fullweight.doctor.operations import try_operations
from fullweight.ops.ascend import AscendOperations
from fullweight.ops.late import WeightGradients, put_off
from fullweight.ops.reference import Compressed, ReferenceOperations

TIGHT = 1e-9  # relative; float64 rounds at 1e-16 and sums here have fewer than 1e4 terms
Call = Callable[[ReferenceOperations], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _emulation() -> None:
    install()


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * scale


def compare(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, **options: bool) -> None:
    """Outputs and the gradients of a random combination of them."""
    results = []
    for operations in (ReferenceOperations(), AscendOperations(limits=False, **options)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = call(operations, *leaves)
        total = sum(
            (out * randn(*out.shape, seed=i + 7)).sum() for i, out in enumerate(outputs) if out.requires_grad
        )
        assert isinstance(total, Tensor)
        results.append((*outputs, *torch.autograd.grad(total, leaves)))
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype), i
        error = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= TIGHT, f"result {i} differs by {error:.2e}"


def rms_norm() -> None:
    compare(lambda o, x, w: (o.rms_norm(x, w, 1e-6),), randn(5, 3, 16, seed=1), randn(16, seed=2))
    compare(lambda o, x: (o.rms_norm(x, None, 1e-3),), randn(5, 16, seed=1))


def rotary() -> None:
    angles = randn(6, 4, seed=3)
    for shape in ((6, 20), (6, 3, 20), (6, 3, 8)):
        compare(lambda o, x: (o.rotary(x, angles.cos(), angles.sin()),), randn(*shape, seed=1))
        compare(lambda o, x: (o.norm_rotary(x, None, 1e-6, angles.cos(), -angles.sin()),), randn(*shape, seed=2))


def swiglu() -> None:
    x = randn(7, 24, seed=1, scale=6.0)
    x[0, 0], x[0, 12], x[1, 12] = 4.0, 4.0, -4.0  # on the bounds, where torch passes the gradient
    compare(lambda o, x: (o.swiglu(x, 4.0),), x)


def experts() -> None:
    experts, d, f = 5, 12, 8
    weights = (randn(experts, 2 * f, d, seed=4), randn(experts, d, f, seed=5))
    # the last: choices of no expert, whose weight is 0
    for tokens, top_k, spread in (
        (9, 2, (0, 1, 4)),
        (4, 1, (2,)),
        (6, 3, range(experts)),
        (5, 2, (3, experts, 1)),
    ):
        choices = [[spread[(t + k) % len(spread)] for k in range(top_k)] for t in range(tokens)]
        chosen = torch.tensor(choices)
        compare(
            lambda o, x, w, *m, chosen=chosen: (o.experts(x, chosen, w, *m, 1.5),),
            randn(tokens, d, seed=1),
            randn(tokens, top_k, seed=2).abs() * (chosen < experts),
            *weights,
        )


def cross_entropy() -> None:
    targets = torch.arange(1300) * 7 % 23  # two chunks of tokens
    compare(
        lambda o, hidden, head: o.cross_entropy(hidden, head, targets, randn(1300, seed=9).abs()),
        randn(1300, 6, seed=1),
        randn(23, 6, seed=2),
    )


def hyper_connection() -> None:
    n, d = 4, 8
    inputs = (
        randn(6, n, d, seed=1),
        randn((2 + n) * n, n * d, seed=2),
        randn((2 + n) * n, seed=3),
        randn(3, seed=4),
    )

    def both(o: ReferenceOperations, streams: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        out = o.hyper_pre(streams, *weights, 20, 1e-6, 1e-5)
        return out.input, out.post, out.comb, out.pre, o.hyper_post(streams, out.input, out.post, out.comb)

    compare(both, *inputs, hyper_connection=True)


def sinkhorn() -> None:
    """Of an epsilon beside which the documented gradient is exact: it takes softmax + epsilon for the softmax."""
    logits = randn(6, 4, 4, seed=3, scale=3.0)
    for rounds in (1, 2, 20):
        compare(lambda o, x, n=rounds: (o.sinkhorn(x, n, 1e-15),), logits, sinkhorn=True)
    compare(lambda o, x: (o.sinkhorn(x.detach(), 20, 1e-3), x.sum()), logits, sinkhorn=True)
    inputs = (randn(5, 4, 8, seed=1), randn(24, 32, seed=2, scale=0.1), randn(24, seed=3), randn(3, seed=4))

    def whole(o: ReferenceOperations, streams: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        out = o.hyper_pre(streams, *weights, 20, 1e-15, 1e-5)
        return out.input, out.post, out.comb

    compare(whole, *inputs, hyper_connection=True, sinkhorn=True)


def indexer() -> None:
    """Whole numbers, so that scores are equal now and then; documents around what is chosen; slices of the row."""
    whole = PackedLayout.build([9, 3, 41, 1, 27, 30], (4,), 120)
    entries = len(whole.tables[4].entry_tokens)
    queries, keys, weights = (
        randn(*shape, seed=seed).round() for seed, shape in enumerate(((120, 3, 4), (entries, 4), (120, 3)))
    )
    operations = AscendOperations(limits=False)
    for topk in (1, 3, 5, 9, entries + 1):
        for count in (1, 2, 3):
            for part in (Slice(index, count) for index in range(count)):
                first, stop = part.bounds(120)
                table = slice_layout(whole, part).tables[4]
                expected, found = (
                    o.select_entries(queries[first:stop], keys, weights[first:stop], table, topk)
                    for o in (ReferenceOperations(), operations)
                )
                wrong = (expected != found).any(-1).nonzero().flatten().tolist()
                assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
                assert not wrong, f"the choice of {topk} differs by tokens {wrong} of {part}"


def attention(kinds: tuple[str, ...] = ("sliding", "all entries", "chosen entries"), front: int = 0) -> None:
    heads, width, window = 2, 24, 5
    layout = PackedLayout.build([9, 3, 14], (4,), 30)
    tokens, table = layout.num_tokens, layout.tables[4]
    angles = randn(tokens, 4, seed=8)
    if front:  # a slice of a row: its first tokens go on a document, and see rows before them
        layout = PackedLayout.build([tokens], (4,))
        layout = _moved(layout, -front)
    sink = torch.tensor([0.5, -40.0], dtype=torch.float64)
    for kind in kinds:
        selected = _selection(table, tokens, 3) if kind == "chosen entries" else None

        def call(
            o: ReferenceOperations,
            q: Tensor,
            kv: Tensor,
            sink: Tensor,
            entries: Tensor,
            kind=kind,
            selected=selected,
        ) -> tuple[Tensor, ...]:
            compressed = Compressed(entries, table, selected) if kind != "sliding" else None
            out = o.attention(q, kv, sink, layout, window, (angles.cos(), angles.sin()), compressed)
            return (out.out + 0 * entries.sum(), out.lse, *([] if out.mass is None else [out.mass]))

        inputs = (randn(tokens, heads, width, seed=1), randn(front + tokens, width, seed=2), sink)
        compare(call, *inputs, randn(table.entry_tokens.shape[0], width, seed=3))


def _moved(layout: PackedLayout, starts: int) -> PackedLayout:
    from dataclasses import replace

    return replace(layout, document_starts=layout.document_starts + starts)


def _selection(table: Any, tokens: int, k: int) -> Tensor:
    """Up to k visible entries of each token, ascending, -1 last."""
    result = torch.full((tokens, k), -1)
    for t in range(tokens):
        visible = list(range(int(table.entry_begin[t]), int(table.entry_end[t])))[:: 1 + t % 2][-k:]
        result[t, : len(visible)] = torch.tensor(visible, dtype=torch.int64)
    return result


CHECKS = (rms_norm, rotary, swiglu, experts, cross_entropy, hyper_connection, sinkhorn, indexer, attention)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_operation_means_the_same(check: Callable[[], None]) -> None:
    check()


def test_the_doctors_self_test_passes() -> None:
    """Within the operators' limits: each operation is tried in a type that they take."""
    results = try_operations(AscendOperations(), torch.device("cpu"))
    assert [
        r for r in results if r.failure or not max(r.error or 0.0, r.gradient_error or 0.0) <= r.tolerance
    ] == []
    assert {r.operation for r in results if r.dtype == "bf16"} == {r.operation for r in results}


def test_attention_of_a_slice_reads_rows_before_it() -> None:
    attention(("sliding",), front=4)


def test_a_sink_far_above_the_logits_takes_all() -> None:
    layout = PackedLayout.build([4])
    turn = (torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    q, kv = randn(4, 1, 8, seed=1).requires_grad_(), randn(4, 8, seed=2).requires_grad_()
    sink = torch.tensor([2000.0], dtype=torch.float64, requires_grad=True)
    result = AscendOperations(limits=False).attention(q, kv, sink, layout, 4, turn)
    result.out.sum().backward()
    assert result.lse.tolist() == [[2000.0]] * 4
    for tensor in (result.out, q.grad, kv.grad, sink.grad):
        assert tensor is not None
        assert not tensor.any()


def test_weight_gradients_can_wait() -> None:
    """Inside `put_off` experts leave their weights' gradients for later, and these are the same."""
    chosen = torch.tensor([[0, 2], [1, 2], [2, 0]])
    inputs = [randn(3, 6, seed=1), randn(3, 2, seed=2), randn(3, 8, 6, seed=3), randn(3, 6, 4, seed=4)]

    def run(late: bool) -> list[Tensor | None]:
        x, w, *matrices = (t.clone().requires_grad_() for t in inputs)
        queue = WeightGradients()
        operations = AscendOperations(limits=False)
        if late:
            with put_off(queue):
                operations.experts(x, chosen, w, *matrices, 2.0).sum().backward()
            assert all(m.grad is None for m in matrices)
            queue.take()()
        else:
            operations.experts(x, chosen, w, *matrices, 2.0).sum().backward()
        return [t.grad for t in (x, w, *matrices)]

    for now, later in zip(run(False), run(True), strict=True):
        assert now is not None
        assert later is not None
        assert torch.equal(now, later)


def _replaced(name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """The operator `name`, called through `change(operator, *arguments)`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(torch.ops.npu, name)
        monkeypatch.setattr(torch.ops.npu, name, lambda *args, **options: change(original, *args, **options))

    return patch


MUTATIONS: dict[str, tuple[Callable[[], None], Callable[[pytest.MonkeyPatch], None]]] = {
    "rotary by halves": (rotary, _replaced("npu_rotary_mul", lambda op, x, c, s, mode: op(x, c, s, "half"))),
    "rotary backwards": (rotary, _replaced("npu_rotary_mul", lambda op, x, c, s, mode: op(x, c, -s, mode))),
    "epsilon": (rms_norm, _replaced("npu_rms_norm", lambda op, x, g, eps: op(x, g))),
    "swish of 1.702": (swiglu, _replaced("npu_clipped_swiglu", lambda op, x, **o: op(x, **{**o, "alpha": 1.702}))),
    "up plus 1": (swiglu, _replaced("npu_clipped_swiglu", lambda op, x, **o: op(x, **{**o, "bias": 1.0}))),
    "limit of 7": (swiglu, _replaced("npu_clipped_swiglu", lambda op, x, **o: op(x, **{**o, "limit": 7.0}))),
    "odd and even": (
        swiglu,
        _replaced("npu_clipped_swiglu", lambda op, x, **o: op(x, **{**o, "interleaved": True})),
    ),
    "halves swapped": (
        swiglu,
        _replaced("npu_swiglu_backward", lambda op, g, x, d: op(g, torch.cat(x.chunk(2, -1)[::-1], -1), d)),
    ),
    "counts for ends": (
        experts,
        _replaced("npu_grouped_matmul_add_", lambda op, *a: op(*a, group_list_type=1)),
    ),
    "outer product transposed": (
        experts,
        _replaced(
            "npu_grouped_matmul_add_",
            lambda op, y, a, b, ends: op(y.mT.contiguous(), b, a, ends).reshape(y.shape),
        ),
    ),
    "rows not summed": (
        experts,
        _replaced("npu_moe_token_unpermute", lambda op, rows, place, ones: op(rows, place, ones / ones.shape[1])),
    ),
    "mean instead of each": (
        cross_entropy,
        _replaced("npu_cross_entropy_loss_backward", lambda op, g, *a, **o: op(g / len(g), *a, **o)),
    ),
    "mixing transposed": (hyper_connection, _replaced("npu_mhc_post", lambda op, x, r, *a: op(x, r.mT, *a))),
    "mixing epsilon": (
        hyper_connection,
        _replaced("npu_mhc_pre", lambda op, *a, **o: op(*a, **{**o, "norm_eps": 1e-2})),
    ),
    "columns before rows": (
        sinkhorn,
        _replaced("npu_mhc_sinkhorn", lambda op, x, **o: (op(x.mT, **o)[0].mT, *op(x, **o)[1:])),
    ),
    "a round less": (
        sinkhorn,
        _replaced("npu_mhc_sinkhorn", lambda op, x, **o: op(x, **{**o, "num_iters": max(1, o["num_iters"] - 1)})),
    ),
    "entries not masked": (
        indexer,
        _replaced("npu_lightning_indexer", lambda op, *a, **o: op(*a, **{**o, "sparse_mode": 0})),
    ),
    "heads alike": (
        indexer,
        _replaced("npu_lightning_indexer", lambda op, q, k, w, **o: op(q, k, torch.ones_like(w), **o)),
    ),
    "runs put together": (
        indexer,
        _replaced("npu_lightning_indexer", lambda op, *a, **o: op(*a, **{**o, **_one_run(o)})),
    ),
    "scale without square root": (
        attention,
        _replaced("npu_sparse_flash_attention", lambda op, q, k, v, i, s, **o: op(q, k, v, i, s * s, **o)),
    ),
    "sink left out of the gradient": (
        attention,
        _replaced("npu_sparse_flash_attention_grad", lambda op, *a, **o: op(*a[:7], a[7] * 0.5, *a[8:], **o)),
    ),
    "values without gradient": (
        attention,
        _replaced("npu_sparse_flash_attention_grad", lambda op, *a, **o: _without_values(op(*a, **o))),
    ),
}


def _one_run(options: dict[str, Any]) -> dict[str, Tensor]:
    return {name: options[name][-1:] for name in ("actual_seq_lengths_query", "actual_seq_lengths_key")}


def _without_values(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*gradients[:2], torch.zeros_like(gradients[2]), *gradients[3:])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_wiring_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, patch = MUTATIONS[mutation]
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="differs by"):
        check()
