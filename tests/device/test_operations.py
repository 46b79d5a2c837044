"""The best operations of each device against the reference in float64, on inputs as training has them.

bf16, heads of 512 channels, documents in a row, odd numbers of rows and experts: what vendors' operators are for.
On a chip this is what tells whether they do what their documentation says.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.unit.ops.checks import check, random
from torch import Tensor

from fullweight.core.types import PackedLayout
from fullweight.devices import Device
from fullweight.ops import OPERATIONS, available_operations, resolve_operations
from fullweight.ops.reference import Compressed, ReferenceOperations

BF16 = torch.bfloat16
REFERENCE = ReferenceOperations()
TOKENS, HEADS, WIDTH = 67, 4, 512
Call = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture
def ops(device: Device) -> ReferenceOperations:
    """The best set for the device."""
    return resolve_operations(available_operations(device.type)[-1], device.type)


def compare(device: Device, call: Call, operations: ReferenceOperations, *inputs: Tensor) -> None:
    """`call` with the device's operations on the device, and with the reference's in float64 on the host."""
    place = device.device(0)

    def there(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call(operations, *(t.to(place) for t in tensors))
        return tuple(out.cpu() for out in ([outputs] if isinstance(outputs, Tensor) else outputs))

    check(there, lambda *tensors: call(REFERENCE, *tensors), inputs, BF16)


def bf16(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return random(*shape, seed=seed, scale=scale, dtype=BF16)


def test_projections(device: Device, ops: ReferenceOperations) -> None:
    x, weight = bf16(TOKENS, 64, seed=1), bf16(48, 64, seed=2, scale=0.1).float()
    compare(device, lambda o, x, w: o.linear(x, w), ops, x, weight)
    compare(device, lambda o, x, w: o.wide_linear(x, w), ops, x, weight)
    compare(device, lambda o, x, w: o.grouped_linear(x, w), ops, bf16(TOKENS, 4, 64, seed=3), weight)


def test_norm_and_rotary(device: Device, ops: ReferenceOperations) -> None:
    angle = random(TOKENS, 32, seed=5)

    def call(o: ReferenceOperations, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (t.to(x.device, weight.dtype) for t in (angle.cos(), angle.sin()))
        return o.rms_norm(x, weight, 1e-6), o.rotary(x, cos, sin), o.norm_rotary(x, weight, 1e-6, cos, -sin)

    compare(device, call, ops, bf16(TOKENS, HEADS, WIDTH, seed=1), bf16(WIDTH, seed=2).float())


@pytest.mark.slow
def test_large_rows(device: Device, ops: ReferenceOperations) -> None:
    """As large as makes a set compile its kernels, where it does: 2^22 elements and a few."""
    rows = 1025
    angle = random(rows, 4, seed=5)

    def norms(o: ReferenceOperations, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (t.to(x.device, weight.dtype) for t in (angle.cos(), angle.sin()))
        turned = o.norm_rotary(x, None, 1e-6, cos, sin)
        return (
            o.rms_norm(x, weight, 1e-6),
            o.rotary(x, cos, -sin),
            o.norm_rotary(x, weight, 1e-6, cos, sin),
            turned,
        )

    compare(device, norms, ops, bf16(rows, 64, 64, seed=1), bf16(64, seed=2).float())
    gates = bf16(rows, 4096, seed=1)
    gates = torch.where((gates.abs() > 1.5) & (gates.abs() < 2.5), 0.5, gates)
    compare(device, lambda o, x: o.swiglu(x, 2.0), ops, gates)
    comb = torch.softmax(random(rows, 4, 4, seed=7), -1)
    inputs = (bf16(rows, 4, 1024, seed=1), bf16(rows, 1024, seed=5), random(rows, 4, seed=6), comb)
    compare(device, lambda o, *t: o.hyper_post(*t), ops, *inputs)
    compare(device, lambda o, *t: o.hyper_mix(*t), ops, bf16(rows, 4, 1024, seed=1), random(rows, 4, seed=6))


def test_swiglu(device: Device, ops: ReferenceOperations) -> None:
    # far from the limit, or one rounding would throw a value to its other side, where the gradient jumps
    x = bf16(TOKENS, 96, seed=1)
    x = torch.where((x.abs() > 1.5) & (x.abs() < 2.5), 0.5, x)
    compare(device, lambda o, x: o.swiglu(x, 2.0), ops, x)


@pytest.mark.parametrize("kind", ["sliding", "all entries", "chosen entries"])
def test_attention(device: Device, ops: ReferenceOperations, kind: str) -> None:
    layout = PackedLayout.build([23, 40], (4,), TOKENS)
    table, angle = layout.tables[4], random(TOKENS, 32, seed=5)
    offset = torch.arange(6)
    selected = table.entry_begin.unsqueeze(1) + 2 * offset  # every second visible entry
    selected = (
        torch.where(selected < table.entry_end.unsqueeze(1), selected, -1) if kind == "chosen entries" else None
    )

    def call(o: ReferenceOperations, q: Tensor, kv: Tensor, sink: Tensor, entries: Tensor) -> tuple[Tensor, ...]:
        place, here = q.device, layout.to(q.device)
        chosen = selected.to(place) if kind == "chosen entries" else None
        compressed = Compressed(entries, here.tables[4], chosen) if kind != "sliding" else None
        turn = (angle.cos().to(place, sink.dtype), angle.sin().to(place, sink.dtype))
        result = o.attention(q, kv, sink, here, 16, turn, compressed)
        return (result.out + 0 * entries.sum(), *([] if result.mass is None else [result.mass]))

    inputs = (bf16(TOKENS, HEADS, WIDTH, seed=1), bf16(TOKENS, WIDTH, seed=2), random(HEADS, seed=3))
    compare(device, call, ops, *inputs, bf16(TOKENS // 4, WIDTH, seed=4))


def test_hyper_connections(device: Device) -> None:
    """Also where a set has to be asked for this group by name."""
    operations = OPERATIONS[available_operations(device.type)[-1]].for_group("hyper_connection")
    n, d = 4, 128

    def pre(
        o: ReferenceOperations, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        out = o.hyper_pre(streams, fn, base, scale, 20, 1e-6, 1e-6)
        return out.input, out.post, out.comb

    weights = (random((2 + n) * n, n * d, seed=2, scale=0.05), random((2 + n) * n, seed=3), random(3, seed=4))
    streams = bf16(TOKENS, n, d, seed=1)
    compare(device, pre, operations, streams, *weights)
    comb = torch.softmax(random(TOKENS, n, n, seed=7), -1)
    inputs = (streams, bf16(TOKENS, d, seed=5), random(TOKENS, n, seed=6), comb)
    compare(device, lambda o, *t: o.hyper_post(*t), operations, *inputs)


@pytest.mark.parametrize("used", [[0, 1, 2, 3, 4], [3, 1]])
def test_experts(device: Device, ops: ReferenceOperations, used: list[int]) -> None:
    chosen = torch.tensor([[used[(t + k) % len(used)] for k in range(2)] for t in range(TOKENS)])

    def call(o: ReferenceOperations, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return o.experts(x, chosen.to(x.device), weights, gate_up, down, 10.0)

    matrices = (bf16(5, 64, 128, seed=3, scale=0.1).float(), bf16(5, 128, 32, seed=4, scale=0.1).float())
    compare(device, call, ops, bf16(TOKENS, 128, seed=1), random(TOKENS, 2, seed=2).abs(), *matrices)


def test_cross_entropy(device: Device, ops: ReferenceOperations) -> None:
    targets, weights = torch.arange(TOKENS) * 11 % 97, random(TOKENS, seed=9).abs()

    def call(o: ReferenceOperations, hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        place = hidden.device
        loss, log_probs = o.cross_entropy(hidden, head, targets.to(place), weights.to(place, head.dtype))
        return loss, log_probs

    compare(device, call, ops, bf16(TOKENS, 64, seed=1), bf16(97, 64, seed=2, scale=0.1).float())
