"""Operations for Ascend NPUs: torch_npu's fused operators where their documented mathematics is ours.

docs/ascend.md lists every operation: which operators it calls, what had to be adapted, and what runs the
reference because no operator does the same thing. Each call is an autograd function of its own that names the
forward and the backward operator, so that nothing depends on which derivatives torch_npu registers.

What an operator does not take (a head of another width, another type) raises OperationError and says which
setting of the recipe leaves that operation to the reference: nothing is replaced silently. `hyper_connection`
is mapped but has to be asked for by name, because torch_npu 2.13.0 documents its operators for the 950 alone.

Seen with schemas, tensors without data and emulated values only (tests/ascend): no chip has run this.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fullweight.core.errors import ConfigError, OperationError
from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.devices.ascend import Ascend, torch_npu
from fullweight.ops.accelerator import AcceleratorOperations
from fullweight.ops.ascend.attention import HEAD_DIM, HEADS, MOST_KEYS, Sources, SparseAttention, attention_mass
from fullweight.ops.ascend.elementwise import RmsNorm, Rotary, SwiGlu
from fullweight.ops.ascend.experts import AscendProducts
from fullweight.ops.ascend.flops import register_flops
from fullweight.ops.ascend.hyper import (
    SINKHORN_CHIPS,
    STREAMS,
    WIDTH,
    HyperPost,
    HyperPre,
    Sinkhorn,
    register_shapes,
)
from fullweight.ops.ascend.indexer import MOST_HEADS, Runs, select_entries, takes_count
from fullweight.ops.ascend.indexer import WIDTH as INDEX_WIDTH
from fullweight.ops.ascend.loss import CrossEntropy
from fullweight.ops.reference import (
    AttentionOutput,
    Compressed,
    HyperOutput,
    Workload,
    recomputed,
)

NARROW = (torch.bfloat16, torch.float16)


class AscendOperations(AcceleratorOperations):
    """Fused Ascend operations; raises OperationError when torch_npu does not import.

    With `hyper_connection` the hyper-connections are torch_npu's too, `sinkhorn` included where the chip has it.
    Tests set `limits` to False to run the same calls on types and sizes that the operators do not take.
    """

    name = "ascend"
    products = AscendProducts

    def __init__(
        self, *, hyper_connection: bool = False, sinkhorn: bool | None = None, limits: bool = True
    ) -> None:
        self.fused_hyper, self.limits = hyper_connection, limits
        self._runs: tuple[object, Runs | None] = (None, None)  # of the row in hand, for all its layers
        try:
            torch_npu()
        except ConfigError as error:
            raise OperationError(f'the ascend operations: {error}; or set ops.default = "reference"') from None
        self.fused_sinkhorn = sinkhorn
        if sinkhorn is None:
            self.fused_sinkhorn = hyper_connection and Ascend().chip().startswith(SINKHORN_CHIPS)
        register_shapes()
        register_flops()

    @classmethod
    def for_group(cls, group: str) -> Self:
        return cls(hyper_connection=group == "hyper_connection")

    def has_own(self, group: str) -> bool:
        return super().has_own(group) and (group != "hyper_connection" or self.fused_hyper)

    def takes(self, group: str, workload: Workload) -> bool:
        if group == "attention":
            fits = workload.head_dim == HEAD_DIM and workload.num_heads in HEADS
            return fits and workload.dtype in NARROW
        if group == "indexer":
            fits = workload.index_heads <= MOST_HEADS and workload.index_head_dim == INDEX_WIDTH
            return fits and takes_count(workload.index_topk) and workload.dtype in NARROW
        return group != "experts" or workload.dtype in NARROW

    # ---- element-wise -------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # a row too short for a compressed entry has none; which operators take no rows is not documented
        return RmsNorm.apply(x, weight, eps) if x.numel() else super().rms_norm(x, weight, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return Rotary.apply(x, cos, sin) if x.numel() else super().rotary(x, cos, sin)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return SwiGlu.apply(gate_up, limit)

    # ---- hyper-connections --------------------------------------------------------------------------

    def hyper_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
    ) -> HyperOutput:
        if not self.fused_hyper:
            return super().hyper_pre(streams, fn, base, scale, iters, eps, norm_eps)
        self._check_streams(streams)
        mixed, post, logits, pre = HyperPre.apply(streams, fn, base, scale, eps, norm_eps)
        if self.fused_sinkhorn:
            return HyperOutput(mixed, post, self.sinkhorn(logits, iters, eps), pre)
        return HyperOutput(mixed, post, recomputed(self.sinkhorn, logits, iters, eps), pre)

    def sinkhorn(self, logits: Tensor, iters: int, eps: float) -> Tensor:
        return Sinkhorn.apply(logits, iters, eps) if self.fused_sinkhorn else super().sinkhorn(logits, iters, eps)

    def hyper_post(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        if not self.fused_hyper:
            return super().hyper_post(streams, y, post, comb)
        self._check_streams(streams)
        return HyperPost.apply(streams, y, post, comb)

    def _check_streams(self, streams: Tensor) -> None:
        if self.limits and streams.shape[1] not in STREAMS:
            self._refuse("hyper_connection", f"{streams.shape[1]} streams", f"{STREAMS[0]}")
        if self.limits and streams.shape[2] % WIDTH:
            self._refuse("hyper_connection", f"a width of {streams.shape[2]}", f"multiples of {WIDTH}")
        self._check_type("hyper_connection", streams)

    # ---- indexer ------------------------------------------------------------------------------------

    @torch.no_grad()
    def select_entries(
        self, queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int
    ) -> Tensor:
        if not table.spans:
            return super().select_entries(queries, keys, weights, table, topk)
        self._check_indexer(queries, topk)
        row = (table.spans, table.ratio, table.entry_begin.shape[0], topk, keys.device)
        if self._runs[0] != row:
            self._runs = (row, Runs.of(table, topk, keys.device))
        return select_entries(queries, keys, weights, table, topk, self._runs[1])

    def _check_indexer(self, queries: Tensor, topk: int) -> None:
        heads, width = queries.shape[1:]
        if self.limits and (width != INDEX_WIDTH or heads > MOST_HEADS):
            found = f"{heads} heads of {width} channels"
            self._refuse("indexer", found, f"up to {MOST_HEADS} heads of {INDEX_WIDTH} channels")
        if self.limits and not takes_count(topk):
            self._refuse("indexer", f"{topk} chosen entries", "up to 2048, or multiples of 1024 up to 8192")
        self._check_type("indexer", queries)

    # ---- attention ----------------------------------------------------------------------------------

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
        sources = Sources.of(q, kv, layout, window, compressed)
        self._check_attention(q, sources)
        keys = kv if compressed is None else torch.cat((kv, compressed.entries))
        out, lse = SparseAttention.apply(q, keys, sink, sources)
        mass = None if compressed is None else attention_mass(q, lse, compressed)
        return AttentionOutput(self.rotary(out, turn[0], -turn[1]), lse, mass)

    def _check_attention(self, q: Tensor, sources: Sources) -> None:
        heads, width = q.shape[1:]
        if self.limits and width != HEAD_DIM:
            self._refuse("attention", f"a head of {width} channels", f"{HEAD_DIM}")
        if self.limits and heads not in HEADS:
            self._refuse("attention", f"{heads} heads", f"{', '.join(map(str, HEADS))}")
        if self.limits and sources.num_places > MOST_KEYS:
            self._refuse("attention", f"{sources.num_places} keys for each query", f"at most {MOST_KEYS}")
        self._check_type("attention", q)

    # ---- experts and head ---------------------------------------------------------------------------

    def check_experts(self, x: Tensor) -> None:
        self._check_type("experts", x)

    def cross_entropy(
        self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return CrossEntropy.apply(hidden, head, targets, weights)

    def _check_type(self, group: str, x: Tensor) -> None:
        if self.limits and x.dtype not in NARROW:
            self._refuse(group, str(x.dtype).removeprefix("torch."), "bfloat16 or float16")

    def _refuse(self, group: str, found: str, taken: str) -> None:
        raise OperationError(
            f"{group} of the ascend operations: torch_npu's operators take {taken}, found {found}; "
            f'set ops.{group} = "reference"'
        )
