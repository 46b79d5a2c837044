"""The compressor: windows of m tokens pooled into one entry by a learned gate, per channel.

HCA pools 128 tokens without overlap; CSA (and its indexer) pools 4 tokens jointly with the 4 before, each
token giving one half of its channels to its own window and the other half to the next. The projections, the
gate's softmax and the pooling are fp32, as in the reference code. Source: report sections 2.3.1 and 2.3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fullweight.core.types import CompressionTable
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config
from fullweight.models.deepseek_v4.layers import Norm, Projection
from fullweight.models.deepseek_v4.rotary import Rotation
from fullweight.models.deepseek_v4.tokens import TokenAxis
from fullweight.ops.reference import ReferenceOperations


@dataclass(frozen=True)
class CompressorOutput:
    """The row's entries [E, c], normed and rotated, in the compute dtype; values and gates [T, W] fp32."""

    entries: Tensor
    values: Tensor
    gates: Tensor


class Compressor(nn.Module):
    """Entries of width `width` for one ratio."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations, ratio: int, width: int) -> None:
        super().__init__()
        self.ops, self.ratio, self.overlap = ops, ratio, ratio == CSA_RATIO
        channels = width * (2 if self.overlap else 1)
        self.wkv = Projection(ops, config.hidden_size, channels)
        self.wgate = Projection(ops, config.hidden_size, channels)
        self.ape = nn.Parameter(torch.empty(ratio, channels))
        self.norm = Norm(ops, width, config.rms_norm_eps)

    def forward(self, x: Tensor, table: CompressionTable, rotation: Rotation, axis: TokenAxis) -> CompressorOutput:
        """x [T, d]; `rotation` belongs to the positions of the entries that `table` makes from them."""
        # a window whose last token is here began at most `reach` rows before the first
        reach = 2 * self.ratio - 1 if self.overlap else self.ratio - 1
        values, gates = axis.before(reach, *self.project(x))
        front = values.shape[0] - x.shape[0]
        if front:
            table = replace(table, entry_tokens=table.entry_tokens + front)
        pooled = self.ops.compress(values, gates, self.ape, table, self.overlap)
        made = self.finish(pooled, rotation, x.dtype)
        return CompressorOutput(axis.entries(made, table.entry_order), values, gates)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates [T, W], fp32."""
        return self.ops.wide_linear(x, self.wkv.weight), self.ops.wide_linear(x, self.wgate.weight)

    def finish(self, pooled: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        """Norm and rotate pooled entries [E, c]."""
        normed = self.ops.norm_rotary(pooled, self.norm.weight, self.norm.eps, rotation.cos, rotation.sin)
        return normed.to(dtype)
