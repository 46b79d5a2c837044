"""Every call of torch_npu's operators in our code, against torch_npu: schema, shapes and types at real sizes.

Tensors without data on device `npu` go through the Ascend operations, forward and backward. torch refuses a
call that does not fit the operator's registered schema; torch_npu's own shape functions say what comes out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fullweight
from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.ops import implementations, resolve_operations
from fullweight.ops.ascend import AscendOperations
from fullweight.ops.reference import AttentionOutput, Compressed, HyperOutput, ReferenceOperations, Workload
from fullweight.rehearse.fake import without_data

NPU = "npu:0"


@dataclass(frozen=True)
class Sizes:
    """Of one model; heads and experts are those of a rank."""

    tokens: int
    hidden: int
    heads: int
    topk: int
    experts: int
    expert_width: int
    vocabulary: int


FLASH = Sizes(4096, 4096, 64, 512, 256, 2048, 129280)
PRO = Sizes(8192, 7168, 128, 1024, 3, 3072, 129280)
SMALL = Sizes(37, 128, 1, 5, 1, 16, 11)  # odd numbers, one expert, one head
SIZES = {"flash": FLASH, "pro": PRO, "small": SMALL}

# two documents; made here, where tensors have values
LAYOUTS = {
    s.tokens: PackedLayout.build([s.tokens // 3, s.tokens - s.tokens // 3], (4, 128)) for s in SIZES.values()
}

called: set[str] = set()


class Calls(TorchDispatchMode):
    """Writes down which of torch_npu's operators ran."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            called.add(func._schema.name.removeprefix("npu::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest) -> Iterator[Sizes]:
    with FakeTensorMode(allow_non_fake_inputs=True), Calls():
        yield SIZES[request.param]


def layout_of(tokens: int) -> PackedLayout:
    mode = active_fake_mode()
    assert mode is not None
    return without_data(LAYOUTS[tokens], mode).to(NPU)


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=NPU, requires_grad=True)


def fp32(*shape: int) -> Tensor:
    return torch.empty(shape, device=NPU, requires_grad=True)


def both(call: Any, *inputs: Tensor, **options: bool) -> None:
    """Shapes and types of outputs and gradients are the reference's."""
    facts = []
    for operations in (ReferenceOperations(), AscendOperations(**options)):
        outputs = call(operations, *inputs)
        if isinstance(outputs, AttentionOutput):
            outputs = (outputs.out, outputs.lse, *([] if outputs.mass is None else [outputs.mass]))
        elif isinstance(outputs, HyperOutput):
            outputs = (outputs.input, outputs.post, outputs.comb, outputs.pre)
        elif isinstance(outputs, Tensor):
            outputs = (outputs,)
        total = sum((out.float().sum() for out in outputs if out.requires_grad), torch.zeros((), device=NPU))
        found = (*outputs, *torch.autograd.grad(total, inputs))
        facts.append([(t.shape, t.dtype, t.device.type) for t in found])
    assert facts[0] == facts[1]
    assert {device for _, _, device in facts[1]} == {"npu"}


def test_projections(sizes: Sizes) -> None:
    x = bf16(sizes.tokens, sizes.hidden)
    both(lambda o, x, w: o.linear(x, w), x, fp32(24, sizes.hidden))
    both(lambda o, x, w: o.wide_linear(x, w), x, fp32(24, sizes.hidden))
    both(lambda o, x, w: o.grouped_linear(x, w), bf16(sizes.tokens, 4, 32), fp32(4 * 16, 32))


def test_norm_and_rotary(sizes: Sizes) -> None:
    cos = torch.empty(sizes.tokens, 32, device=NPU)
    both(lambda o, x, w: o.rms_norm(x, w, 1e-6), bf16(sizes.tokens, sizes.hidden), fp32(sizes.hidden))
    both(lambda o, x, w: o.rms_norm(x, w, 1e-6), bf16(sizes.tokens, 4, sizes.hidden), fp32(sizes.hidden))
    for heads, width in ((sizes.heads, 512), (64, 128)):  # attention's and the indexer's queries
        both(lambda o, x: o.norm_rotary(x, None, 1e-6, cos, cos), bf16(sizes.tokens, heads, width))
    both(lambda o, x, w: o.norm_rotary(x, w, 1e-6, cos, cos), bf16(sizes.tokens, 512), fp32(512))
    # a compressor's entries are fp32
    both(lambda o, x, w: o.norm_rotary(x, w, 1e-6, cos, cos), fp32(sizes.tokens, 512), fp32(512))


def test_swiglu(sizes: Sizes) -> None:
    both(lambda o, x: o.swiglu(x, 10.0), bf16(sizes.tokens, 2 * sizes.expert_width))


def test_indexer(sizes: Sizes) -> None:
    """The small row has no token that must choose, and calls nothing."""
    table = layout_of(sizes.tokens).tables[4]
    queries, keys = bf16(sizes.tokens, 64, 128), bf16(table.entry_tokens.shape[0], 128)
    weights = fp32(sizes.tokens, 64)
    for topk in (sizes.topk, 1):
        found = [
            o.select_entries(queries, keys, weights, table, topk)
            for o in (ReferenceOperations(), AscendOperations())
        ]
        assert len({(t.shape, t.dtype, t.device) for t in found}) == 1


@pytest.mark.parametrize("kind", ["sliding", "all entries", "chosen entries"])
@pytest.mark.parametrize("front", [0, 127])
def test_attention(sizes: Sizes, kind: str, front: int) -> None:
    tokens = sizes.tokens
    layout, ratio = layout_of(tokens), 4 if kind == "chosen entries" else 128
    cos = torch.empty(tokens, 32, device=NPU)
    entries = bf16(max(tokens // ratio, 1), 512)
    selected = torch.zeros(tokens, sizes.topk, dtype=torch.int64, device=NPU) if ratio == 4 else None

    def call(o: ReferenceOperations, q: Tensor, kv: Tensor, sink: Tensor, *entries: Tensor) -> AttentionOutput:
        compressed = Compressed(entries[0], layout.tables[ratio], selected) if entries else None
        return o.attention(q, kv, sink, layout, 128, (cos, cos), compressed)

    inputs = (bf16(tokens, sizes.heads, 512), bf16(front + tokens, 512), fp32(sizes.heads))
    both(call, *inputs, *([] if kind == "sliding" else [entries]))


def test_experts(sizes: Sizes) -> None:
    """The reference asks values where rows are, so shapes are those of the inputs."""
    tokens, top_k, f = sizes.tokens, 6, sizes.expert_width
    inputs = (
        bf16(tokens, sizes.hidden),
        fp32(tokens, top_k),
        fp32(sizes.experts, 2 * f, sizes.hidden),
        fp32(sizes.experts, sizes.hidden, f),
    )
    for width in (top_k, 1):  # rows from other ranks come with one choice each
        x, weights = inputs[0], inputs[1][:, :width]
        chosen = torch.zeros(tokens, width, dtype=torch.int64, device=NPU)
        out = AscendOperations().experts(x, chosen, weights, *inputs[2:], 10.0)
        assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
        gradients = torch.autograd.grad(out.float().sum(), inputs)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in inputs]


def test_flops_of_products_are_counted(sizes: Sizes) -> None:
    """The experts' six products and the three of a projection and its gradients, by hand."""
    tokens, top_k, d, f = sizes.tokens, 6, sizes.hidden, sizes.expert_width
    chosen = torch.zeros(tokens, top_k, dtype=torch.int64, device=NPU)
    operations = AscendOperations()
    weights = (fp32(sizes.experts, 2 * f, d), fp32(sizes.experts, d, f))
    with FlopCounterMode(display=False) as counter:
        operations.experts(bf16(tokens, d), chosen, fp32(tokens, top_k), *weights, 10.0).float().sum().backward()
    assert counter.get_total_flops() == 3 * tokens * top_k * 2 * (d * 2 * f + f * d)
    with FlopCounterMode(display=False) as counter:
        operations.linear(bf16(tokens, d), fp32(48, d)).float().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * tokens * d * 48


def test_cross_entropy(sizes: Sizes) -> None:
    targets = torch.zeros(sizes.tokens, dtype=torch.int64, device=NPU)
    weights = torch.empty(sizes.tokens, device=NPU)
    inputs = (bf16(sizes.tokens, sizes.hidden), fp32(sizes.vocabulary, sizes.hidden))
    both(lambda o, hidden, head: o.cross_entropy(hidden, head, targets, weights), *inputs)


def test_hyper_connections(sizes: Sizes) -> None:
    streams = bf16(sizes.tokens, 4, sizes.hidden)
    weights = (fp32(24, 4 * sizes.hidden), fp32(24), fp32(3))
    both(lambda o, *t: o.hyper_pre(*t, 20, 1e-6, 1e-6), streams, *weights, hyper_connection=True)
    both(lambda o, *t: o.hyper_pre(*t, 20, 1e-6, 1e-6), streams, *weights, hyper_connection=True, sinkhorn=True)
    y, post, comb = bf16(sizes.tokens, sizes.hidden), fp32(sizes.tokens, 4), fp32(sizes.tokens, 4, 4)
    both(lambda o, *t: o.hyper_post(*t), streams, y, post, comb, hyper_connection=True)
    both(lambda o, x: o.sinkhorn(x, 20, 1e-6), fp32(sizes.tokens, 4, 4), sinkhorn=True)


def test_no_call_was_left_out() -> None:
    """The operators that the code names are those that ran above; this test comes last in the file."""
    named = set()
    every = torch._C._dispatch_get_all_op_names()
    registered = {n.removeprefix("npu::").partition(".")[0] for n in every if n.startswith("npu::npu_")}
    package = Path(fullweight.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu":
                named.add(node.attr)
            used = isinstance(node, ast.Attribute) and node.attr in registered
            assert not used or ast.unparse(node.value) == "torch.ops.npu", f"{path}: {ast.unparse(node)}"
    assert len(named) > 10
    # the public name of this one is a composition of the operator that runs
    assert named == {name.replace("_npu_moe_token_unpermute", "npu_moe_token_unpermute") for name in called}


def test_limits_are_errors_that_name_the_setting() -> None:
    turn = (torch.ones(4, 4), torch.zeros(4, 4))
    layout = PackedLayout.build([4])

    def attend(heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
        q, kv = torch.zeros(4, heads, width, dtype=dtype), torch.zeros(4, width, dtype=dtype)
        AscendOperations().attention(q, kv, torch.zeros(heads), layout, 4, turn)

    with pytest.raises(OperationError, match=r'take 512, found a head of 64 channels; set ops.attention = "refer'):
        attend(4, 64)
    with pytest.raises(OperationError, match="found 48 heads"):
        attend(48, 512)
    with pytest.raises(OperationError, match="found float32"):
        attend(4, 512, torch.float32)
    for heads, width, topk in ((64, 16, 4), (128, 128, 4), (64, 128, 3000)):
        table = PackedLayout.build([4], (4,)).tables[4]
        queries = torch.zeros(4, heads, width, dtype=torch.bfloat16)
        with pytest.raises(OperationError, match=r'set ops.indexer = "reference"'):
            AscendOperations().select_entries(queries, queries[:1, 0], torch.zeros(4, heads), table, topk)
    with pytest.raises(OperationError, match="found 2 streams"):
        AscendOperations(hyper_connection=True).hyper_post(torch.zeros(4, 2, 128), *(torch.zeros(()),) * 3)


def test_auto_takes_what_the_operators_take_and_records_it() -> None:
    large = resolve_operations("auto", "npu", workload=Workload(torch.bfloat16, 128, 512, 64, 128, 1024))
    assert large.name == "ascend"
    own = {"linear", "norm_rotary", "swiglu", "indexer", "attention", "experts", "cross_entropy"}
    assert {group for group, name in implementations(large).items() if name == "ascend"} == own
    small = resolve_operations("auto", "npu", workload=Workload(torch.float32, 4, 64, 8, 16, 32))
    assert small.name == "ascend, indexer=reference, attention=reference, experts=reference"
    asked = resolve_operations("auto", "npu", {"hyper_connection": "ascend"})
    assert implementations(asked)["hyper_connection"] == "ascend"
    with pytest.raises(OperationError, match=r"ops\.compress: the ascend operations have none of their own"):
        resolve_operations("ascend", "npu", {"compress": "ascend"})
