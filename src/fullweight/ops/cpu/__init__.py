"""Operations for CPUs: matrix products by torch (oneDNN), everything around them in fused kernels.

Each keeps the least that backward needs and casts fp32 master weights where they are used, so that no copy of
them outlives its product. What the kernels are not compiled for - float64, numbers of
hyper-connection streams other than 1, 2 and 4, streams whose width is no multiple of 16 - runs the reference
operation of the same name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.ops.cpu.attention import Attend
from fullweight.ops.cpu.compressor import Compress
from fullweight.ops.cpu.experts import ExpertMixture
from fullweight.ops.cpu.hyper import COMPILED_STREAMS, LANES, HyperHead, HyperPost, HyperPre, mix_streams
from fullweight.ops.cpu.indexer import IndexLoss, select_entries
from fullweight.ops.cpu.loss import CrossEntropy
from fullweight.ops.cpu.memory import prepare_memory
from fullweight.ops.cpu.norm import NormRotary
from fullweight.ops.cpu.swiglu import SwiGlu
from fullweight.ops.cpu.wide import wide_product
from fullweight.ops.late import split
from fullweight.ops.linear import CastLinear, GroupedLinear, WideLinear
from fullweight.ops.native import kernels
from fullweight.ops.reference import AttentionOutput, Compressed, HyperOutput, ReferenceOperations

Method = TypeVar("Method", bound=Callable[..., Any])


def compiled_for(fits: Callable[..., bool]) -> Callable[[Method], Method]:
    """Send calls whose arguments the kernels are not compiled for to the reference operation of the same name."""

    def decorate(method: Method) -> Method:
        reference = getattr(ReferenceOperations, method.__name__)

        @functools.wraps(method)
        def chosen(self: CpuOperations, *arguments: Any) -> Any:
            return (method if fits(*arguments) else reference)(self, *arguments)

        return cast(Method, chosen)

    return decorate


def _compiled(x: Tensor, *_: Any) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16)


def _rotated(x: Tensor, *others: Any) -> bool:
    cos = others[-2]
    return _compiled(x) and cos.dtype == torch.float32


def _streams(streams: Tensor, weight: Tensor, *_: Any) -> bool:
    fits = streams.shape[1] in COMPILED_STREAMS and streams.shape[2] % LANES == 0
    return fits and _compiled(streams) and _compiled(weight)


class CpuOperations(ReferenceOperations):
    """Fused CPU operations; raises OperationError when they cannot be compiled here."""

    name = "cpu"

    def __init__(self) -> None:
        kernels()
        prepare_memory()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return CastLinear.apply(x, *split(x, weight))

    def wide_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return WideLinear.apply(x, *split(x, weight), wide_product)

    def grouped_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return GroupedLinear.apply(x, *split(x, weight))

    @compiled_for(_compiled)
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return NormRotary.apply(x, weight, eps, None, None)

    @compiled_for(_rotated)
    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return NormRotary.apply(x, None, None, cos, sin)

    @compiled_for(_rotated)
    def norm_rotary(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        return NormRotary.apply(x, weight, eps, cos, sin)

    @compiled_for(_compiled)
    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return SwiGlu.apply(gate_up, limit)

    @compiled_for(_streams)
    def hyper_pre(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> HyperOutput:
        return HyperOutput(*HyperPre.apply(streams, fn, base, scale, iters, eps, norm_eps))

    @compiled_for(_streams)
    def hyper_mix(self, streams: Tensor, pre: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (streams.requires_grad or pre.requires_grad):
            return super().hyper_mix(streams, pre)
        return mix_streams(streams, pre)

    @compiled_for(_streams)
    def hyper_post(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return HyperPost.apply(streams, y, post, comb)

    @compiled_for(_streams)
    def hyper_head(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        return HyperHead.apply(streams, fn, base, scale, eps, norm_eps)

    @compiled_for(lambda values, *_: values.dtype == torch.float32)
    def compress(
        self, values: Tensor, gates: Tensor, ape: Tensor, table: CompressionTable, overlap: bool
    ) -> Tensor:
        return Compress.apply(values, gates, ape, table, overlap)

    @compiled_for(_compiled)
    def select_entries(
        self, queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int
    ) -> Tensor:
        return select_entries(queries, keys, weights, table, topk)

    @compiled_for(_compiled)
    def attention(
        self,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        layout: PackedLayout,
        window: int,
        turn: tuple[Tensor, Tensor],
        compressed: Compressed | None = None,
    ) -> AttentionOutput:
        entries, table, selected = None, None, None
        if compressed is not None:
            entries, table, selected = compressed.entries, compressed.table, compressed.selected
        out, lse, mass = Attend.apply(q, kv, sink, entries, layout, window, turn, table, selected)
        return AttentionOutput(out, lse, mass if selected is not None else None)

    @compiled_for(_compiled)
    def indexer_loss(
        self, queries: Tensor, keys: Tensor, weights: Tensor, selected: Tensor, mass: Tensor, num_tokens: int
    ) -> Tensor:
        return IndexLoss.apply(queries, keys, weights, selected, mass, num_tokens)

    @compiled_for(_compiled)
    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        (gate_up, late_gate_up), (down, late_down) = split(x, gate_up), split(x, down)
        return ExpertMixture.apply(x, chosen, weights, gate_up, down, limit, late_gate_up, late_down)

    @compiled_for(_compiled)
    def cross_entropy(
        self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return CrossEntropy.apply(hidden, head, targets, weights)
