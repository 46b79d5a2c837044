"""Every set of operations meets its contract: values and gradients equal float64 formulas, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.ops import available_operations, resolve_operations
from fullweight.ops.cuda import CudaOperations
from fullweight.ops.reference import Compressed, ReferenceOperations

from . import formulas
from .checks import LAYOUT, NUM_TOKENS, TOLERANCE, angles, check, dtypes, error, random

# ---- projections and element-wise ------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1,), (37,), (5, 7)])
def test_linear(ops: ReferenceOperations, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """x W^T in x's dtype; an fp32 master weight gets an fp32 gradient."""
    inputs = [random(*shape, 24, dtype=dtype), random(40, 24, seed=1)]
    check(
        ops.linear, lambda x, w: x @ w.to(dtype).double().T if dtype == torch.bfloat16 else x @ w.T, inputs, dtype
    )
    assert ops.linear(*inputs).dtype == dtype


@dtypes
def test_wide_linear(ops: ReferenceOperations, dtype: torch.dtype) -> None:
    """x W^T in the weight's fp32 whatever x is; x's gradient comes back in x's dtype."""
    inputs = [random(37, 24, dtype=dtype), random(40, 24, seed=1)]
    check(ops.wide_linear, lambda x, w: x @ w.T, inputs, dtype)
    assert ops.wide_linear(*inputs).dtype == torch.float32


@dtypes
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_linear(ops: ReferenceOperations, dtype: torch.dtype, groups: int) -> None:
    """Group g of the output reads group g of the input alone."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x[:, g] @ block.T for g, block in enumerate(w.chunk(groups))], 1)

    check(ops.grouped_linear, formula, [random(33, groups, 12, dtype=dtype), random(groups * 5, 12)], dtype)


@dtypes
@pytest.mark.parametrize("shape", [(1, 16), (70, 48), (13, 4, 32)])
def test_rms_norm(ops: ReferenceOperations, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """With a weight and without, over the last dim; rows of zeros stay zero."""
    x, weight = random(*shape, dtype=dtype, scale=3.0), 1 + random(shape[-1], seed=1)
    check(lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, w: formulas.rms_norm(x, w, 1e-6), [x, weight], dtype)
    check(lambda x: ops.rms_norm(x, None, 1e-2), lambda x: formulas.rms_norm(x, None, 1e-2), [x], dtype)
    assert not ops.rms_norm(torch.zeros_like(x), weight, 1e-6).any()


@dtypes
@pytest.mark.parametrize(("shape", "pairs"), [((40, 32), 8), ((40, 3, 24), 12), ((7, 5, 16), 4)])
def test_rotary(ops: ReferenceOperations, dtype: torch.dtype, shape: tuple[int, ...], pairs: int) -> None:
    """Trailing channels turn by pairs, the others pass; -sin turns back."""
    cos, sin = angles(shape[0], pairs)
    x = random(*shape, dtype=dtype)
    check(lambda x: ops.rotary(x, cos, sin), lambda x: formulas.rotary(x, cos.double(), sin.double()), [x], dtype)
    back = ops.rotary(ops.rotary(x, cos, sin), cos, -sin)
    assert error(back, x.double()) <= TOLERANCE[dtype][0]
    if shape[-1] > 2 * pairs:
        assert torch.equal(ops.rotary(x, cos, sin)[..., : -2 * pairs], x[..., : -2 * pairs])


@dtypes
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_rotary(ops: ReferenceOperations, dtype: torch.dtype, weighted: bool) -> None:
    """Norm, then rotation, per head."""
    cos, sin = angles(21, 8)
    x, weight = random(21, 6, 32, dtype=dtype), 1 + random(32, seed=1)
    inputs = [x, weight] if weighted else [x]

    def operation(x: Tensor, w: Tensor | None = None) -> Tensor:
        return ops.norm_rotary(x, w, 1e-6, cos, sin)

    def formula(x: Tensor, w: Tensor | None = None) -> Tensor:
        return formulas.rotary(formulas.rms_norm(x, w, 1e-6), cos.double(), sin.double())

    check(operation, formula, inputs, dtype)


@dtypes
@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_swiglu(ops: ReferenceOperations, dtype: torch.dtype, limit: float) -> None:
    """Gate clamped above, up on both sides; no gradient flows through a clamped value."""
    x = random(33, 48, dtype=dtype, scale=2.0)
    check(lambda x: ops.swiglu(x, limit), lambda x: formulas.swiglu(x, limit), [x], dtype)
    far = torch.tensor([[50.0, -50.0, 1.0, 1.0, 30.0, -30.0]], dtype=dtype).requires_grad_()
    ops.swiglu(far, limit).sum().backward()
    assert far.grad is not None
    assert far.grad[0, 0] == 0
    assert far.grad[0, 4:].tolist() == [0, 0]


# ---- hyper-connections -------------------------------------------------------------------------------------

# CPU kernels take vectors of 16 in fours and singly, and leave other widths to the reference
HYPER_WIDTHS = [40, 80, 144]


@dtypes
@pytest.mark.parametrize("d", HYPER_WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("iters", [1, 20])
def test_hyper_pre(ops: ReferenceOperations, dtype: torch.dtype, d: int, n: int, iters: int) -> None:
    """Input, post and the Sinkhorn-normalised comb, with all four gradients; post and comb are fp32."""
    width = (2 + n) * n
    inputs = [
        random(19, n, d, dtype=dtype),
        random(width, n * d, seed=1, scale=(n * d) ** -0.5),
        random(width, seed=2),
        1 + random(3, seed=3, scale=0.2),
    ]

    def operation(*tensors: Tensor) -> list[Tensor]:
        result = ops.hyper_pre(*tensors, iters, 1e-6, 1e-6)
        assert result.post.dtype == result.comb.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(ops.hyper_mix(tensors[0], result.pre), result.input), "made again, the same bits"
        return [result.input, result.post, result.comb]

    def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
        return formulas.hyper_pre(*tensors, iters, 1e-6, 1e-6)

    check(operation, formula, inputs, dtype)
    if iters == 20:
        comb = operation(*inputs)[2]
        torch.testing.assert_close(comb.sum(1), torch.ones(19, n), rtol=0, atol=1e-4)
        torch.testing.assert_close(comb.sum(2), torch.ones(19, n), rtol=0, atol=5e-2)


@dtypes
@pytest.mark.parametrize("d", HYPER_WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hyper_post(ops: ReferenceOperations, dtype: torch.dtype, d: int, n: int) -> None:
    """comb's FIRST index is the stream that gives: the transpose would be another model."""
    inputs = [
        random(23, n, d, dtype=dtype),
        random(23, d, dtype=dtype, seed=1),
        random(23, n, seed=2),
        random(23, n, n, seed=3),
    ]
    check(ops.hyper_post, formulas.hyper_post, inputs, dtype)


@dtypes
@pytest.mark.parametrize("d", HYPER_WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hyper_head(ops: ReferenceOperations, dtype: torch.dtype, d: int, n: int) -> None:
    """Streams collapse by gates of their own."""
    inputs = [
        random(17, n, d, dtype=dtype),
        random(n, n * d, seed=1, scale=(n * d) ** -0.5),
        random(n, seed=2),
        1 + random(1, seed=3),
    ]
    check(lambda *t: ops.hyper_head(*t, 1e-6, 1e-6), lambda *t: formulas.hyper_head(*t, 1e-6, 1e-6), inputs, dtype)


@pytest.mark.parametrize("n", [1, 4])
def test_hyper_connections_of_cuda_keep_streams_as_they_came(n: int) -> None:
    """What backward of both ends of a sublayer keeps: the streams once, narrow, and a few numbers a token."""
    tokens, d, width = 64, 256, (2 + n) * n
    streams = random(tokens, n, d, dtype=torch.bfloat16).requires_grad_()
    fn = random(width, n * d, seed=1).requires_grad_()
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        made = CudaOperations().hyper_pre(streams, fn, random(width), torch.ones(3), 1, 1e-6, 1e-6)
        CudaOperations().hyper_post(streams, made.input, made.post, made.comb)
    of_weights, given = fn.untyped_storage().nbytes(), made.input.untyped_storage().nbytes()
    few = tokens * 4 * (30 + 12 * width)
    assert sum(kept.values()) <= of_weights + streams.untyped_storage().nbytes() + given + few


# ---- experts and head --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("used", [[0, 1, 2, 3, 4, 5], [1, 4]])
def test_experts(ops: ReferenceOperations, dtype: torch.dtype, used: list[int]) -> None:
    """Dropless and weighted; an expert that no token chose gets a zero gradient."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(len(used), generator=generator)[:2] for _ in range(45)])
    chosen = torch.tensor(used)[order]
    # bf16 rounding would throw some values to the other side of a nearby clamp, whose gradient jumps
    limit = 1.5 if dtype == torch.float32 else 10.0
    inputs = [
        random(45, 24, dtype=dtype),
        torch.rand(45, 2, generator=generator),
        random(6, 32, 24, seed=1, scale=0.3).to(dtype).float(),
        random(6, 24, 16, seed=2, scale=0.3).to(dtype).float(),
    ]
    check(
        lambda x, w, up, down: ops.experts(x, chosen, w, up, down, limit),
        lambda x, w, up, down: formulas.experts(x, chosen, w, up, down, limit),
        inputs,
        dtype,
    )


@dtypes
@pytest.mark.parametrize("tokens", [1, 70, 1100])
def test_cross_entropy(ops: ReferenceOperations, dtype: torch.dtype, tokens: int) -> None:
    """Weighted sum and per-token log-probability; tokens of weight zero give no gradient."""
    generator = torch.Generator().manual_seed(tokens)
    targets = torch.randint(50, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    weights[tokens // 2 :: 3] = 0.0 if tokens > 1 else 0.5
    inputs = [random(tokens, 24, dtype=dtype), random(50, 24, seed=1, scale=0.5).to(dtype).float()]
    check(
        lambda h, w: ops.cross_entropy(h, w, targets, weights)[0],
        lambda h, w: formulas.cross_entropy(h, w, targets, weights.double())[0],
        inputs,
        dtype,
    )
    total, log_probs = ops.cross_entropy(*inputs, targets, weights)
    exact = formulas.cross_entropy(*(x.double() for x in inputs), targets, weights.double())[1]
    assert total.dtype == log_probs.dtype == torch.float32
    assert not log_probs.requires_grad
    assert error(log_probs, exact) <= TOLERANCE[dtype][0]


@dtypes
def test_cross_entropy_of_extreme_logits(ops: ReferenceOperations, dtype: torch.dtype) -> None:
    """Logits of ten thousand: exact zero loss where right, the gap where wrong, finite gradients."""
    hidden = torch.tensor([[100.0, 0.0], [100.0, 0.0]], dtype=dtype).requires_grad_()
    head = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    total, log_probs = ops.cross_entropy(hidden, head, torch.tensor([0, 1]), torch.ones(2))
    total.backward()
    assert log_probs.tolist() == pytest.approx([0.0, -10000.0], rel=5e-3)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


# ---- all of them -------------------------------------------------------------------------------------------


def test_number_of_threads_does_not_change_the_result(ops: ReferenceOperations) -> None:
    """One thread or three: the same values and gradients to rounding, and the same choice of entries."""
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        q, kv = random(NUM_TOKENS, 3, 16).requires_grad_(), random(NUM_TOKENS, 16, seed=1).requires_grad_()
        entries, sink = random(NUM_TOKENS // 4, 16, seed=2).requires_grad_(), random(3).requires_grad_()
        selected = ops.select_entries(q.detach(), entries.detach(), random(NUM_TOKENS, 3), LAYOUT.tables[4], 5)
        compressed = Compressed(entries, LAYOUT.tables[4], selected)
        turn = angles(NUM_TOKENS, 4)
        out = ops.attention(q, kv, sink, LAYOUT, 16, turn, compressed).out
        out = ops.norm_rotary(out, None, 1e-6, *turn)
        (out * random(*out.shape, seed=4)).sum().backward()
        results.append([selected, out.detach(), q.grad, kv.grad, entries.grad, sink.grad])
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    for one, three in zip(results[0][1:], results[1][1:], strict=True):
        assert error(one, three.double()) <= 1e-5


def test_inputs_need_not_be_contiguous(ops: ReferenceOperations) -> None:
    """Transposed and sliced tensors, and the stride-0 gradient of a sum, give what their copies give."""
    q, kv = random(3, 49, 16).transpose(0, 1), random(49, 32)[:, ::2]
    layout = PackedLayout.build([40, 9], (4,))
    entries = random(16, 12).T
    compressed = Compressed(entries, layout.tables[4])
    copy = Compressed(entries.contiguous(), layout.tables[4])
    cos, sin = angles(49, 4)
    streams = random(4, 49, 16).transpose(0, 1)
    pairs: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda q, kv: ops.attention(q, kv, torch.zeros(3), layout, 8, (cos, sin), compressed).out, [q, kv]),
        (lambda q, kv: ops.attention(q, kv, torch.zeros(3), layout, 8, (cos, sin), copy).out, [q, kv]),
        (lambda q: ops.norm_rotary(q, None, 1e-6, cos, sin), [q]),
        (lambda kv: ops.rms_norm(kv, None, 1e-6), [kv]),
        (lambda kv: ops.swiglu(kv, 10.0), [kv]),
        (lambda kv: ops.linear(kv, torch.ones(6, 16)), [kv]),
        (lambda kv: ops.wide_linear(kv, torch.ones(6, 16)), [kv]),
        (lambda q: ops.grouped_linear(q, torch.ones(9, 16)), [q]),
        (
            lambda s, y: ops.hyper_post(s, y, torch.ones(49, 4), torch.ones(4, 49, 4).transpose(0, 1)),
            [streams, kv],
        ),
    ]
    for function, inputs in pairs:
        loose = [x.detach().requires_grad_() for x in inputs]
        tight = [x.detach().contiguous().requires_grad_() for x in inputs]
        one, two = function(*loose), function(*tight)
        one.sum().backward()
        two.sum().backward()
        assert torch.equal(one, two)
        for a, b in zip(loose, tight, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


FREEZABLE: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda ops, x, w: ops.linear(x, w), [(9, 8), (5, 8)]),
    "wide_linear": (lambda ops, x, w: ops.wide_linear(x, w), [(9, 8), (5, 8)]),
    "grouped_linear": (lambda ops, x, w: ops.grouped_linear(x, w), [(9, 2, 4), (6, 4)]),
    "experts": (
        lambda ops, x, w, u, d: ops.experts(x, torch.tensor([[0, 2], [2, 1], [0, 1]]), w, u, d, 2.0),
        [(3, 4), (3, 2), (4, 6, 4), (4, 4, 3)],
    ),
    "cross_entropy": (
        lambda ops, h, w: ops.cross_entropy(h, w, torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.5, 0.0]))[0],
        [(3, 4), (5, 4)],
    ),
}


@pytest.mark.parametrize("name", list(FREEZABLE))
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(ops: ReferenceOperations, name: str) -> None:
    function, shapes = FREEZABLE[name]

    def gradients(frozen: int | None) -> list[Tensor | None]:
        inputs = [random(*shape, seed=i).requires_grad_(i != frozen) for i, shape in enumerate(shapes)]
        function(ops, *inputs).sum().backward()
        return [x.grad for x in inputs]

    every = gradients(None)
    for frozen in range(len(shapes)):
        for index, gradient in enumerate(gradients(frozen)):
            if index == frozen:
                assert gradient is None
            else:
                assert torch.equal(gradient, every[index]), index  # type: ignore[arg-type]


# float64, or the rotation would round the differences
WIDE_TURN = tuple(x.double() for x in angles(10, 1))

GRADCHECK: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda ops, x, w: ops.rms_norm(x, w, 1e-6), [(5, 8), (8,)]),
    "swiglu": (lambda ops, x: ops.swiglu(x, 1.0), [(4, 8)]),
    "hyper_pre": (
        lambda ops, s, f, b, a: tuple(vars(ops.hyper_pre(s, f, b, a, 5, 1e-6, 1e-6)).values()),
        [(3, 2, 4), (8, 8), (8,), (3,)],
    ),
    "hyper_post": (lambda ops, s, y, p, c: ops.hyper_post(s, y, p, c), [(3, 2, 4), (3, 4), (3, 2), (3, 2, 2)]),
    "hyper_head": (
        lambda ops, s, f, b, a: ops.hyper_head(s, f, b, a, 1e-6, 1e-6),
        [(3, 2, 4), (2, 8), (2,), (1,)],
    ),
    "compress": (
        lambda ops, v, g, a: ops.compress(v, g, a, PackedLayout.build([9, 3, 4], (4,)).tables[4], True),
        [(16, 4), (16, 4), (4, 4)],
    ),
    "attention": (
        lambda ops, q, kv, s, e: (
            ops.attention(
                q, kv, s, (at := PackedLayout.build([6, 4], (4,))), 3, WIDE_TURN, Compressed(e, at.tables[4])
            ).out
        ),
        [(10, 1, 2), (10, 2), (1,), (2, 2)],
    ),
    "experts": (
        lambda ops, x, w, u, d: ops.experts(x, torch.tensor([[0, 2], [2, 1], [0, 1]]), w, u, d, 2.0),
        [(3, 4), (3, 2), (3, 6, 4), (3, 4, 3)],
    ),
    "cross_entropy": (
        lambda ops, h, w: ops.cross_entropy(h, w, torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.5, 0.0]).double())[
            0
        ],
        [(3, 4), (5, 4)],
    ),
}


@pytest.mark.parametrize("name", list(GRADCHECK))
def test_gradients_equal_finite_differences(ops: ReferenceOperations, name: str) -> None:
    """In float64, which every set takes (where need be through the reference), against central differences."""
    function, shapes = GRADCHECK[name]
    inputs = [random(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *tensors: function(ops, *tensors), inputs, atol=1e-6)


def test_sets_are_chosen_by_name() -> None:
    """Each available name resolves to itself, "auto" to the best, anything else raises with the nearest."""
    names = available_operations()
    assert names[0] == "reference"
    assert [resolve_operations(name).name for name in names] == names
    assert resolve_operations("auto").name == names[-1]
    with pytest.raises(OperationError, match="reference"):
        resolve_operations("refrence")
