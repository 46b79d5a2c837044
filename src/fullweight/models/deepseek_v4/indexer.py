"""The lightning indexer: a small scorer that picks which compressed entries a token attends to.

It has a compressor of its own and reads the attention's normed query latent. Nothing flows through its choice,
so it is trained by a loss of its own: KL(p || softmax(I)), with p the attention's own distribution over the
same entries. Its inputs are detached: the indexer learns from this loss alone and the trunk from the
language loss alone. Source: report section 2.3.1; the loss is DeepSeek-V3.2's (section 2.1 of its report).
Left out: the Hadamard rotation and FP4 rounding of the released inference code, which change nothing in
exact arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fullweight.core.types import CompressionTable
from fullweight.models.deepseek_v4.compressor import Compressor, CompressorOutput
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config
from fullweight.models.deepseek_v4.layers import Projection
from fullweight.models.deepseek_v4.rotary import Rotation
from fullweight.models.deepseek_v4.tokens import TokenAxis
from fullweight.ops.reference import ReferenceOperations


@dataclass(frozen=True)
class IndexerOutput:
    """queries [T, Hi, ci], weights [T, Hi] fp32, the compressor's output and selected [T, k] int64."""

    queries: Tensor
    weights: Tensor
    compressed: CompressorOutput
    selected: Tensor


class Indexer(nn.Module):
    """Scores I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]) and takes the top `index_topk` visible entries."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        heads, width = config.index_n_heads, config.index_head_dim
        self.compressor = Compressor(config, ops, CSA_RATIO, width)
        self.wq_b = Projection(ops, config.q_lora_rank, heads * width)
        self.weights_proj = Projection(ops, config.hidden_size, heads)

    def forward(
        self,
        x: Tensor,
        latent: Tensor,
        table: CompressionTable,
        rotation: Rotation,
        entry_rotation: Rotation,
        axis: TokenAxis,
    ) -> IndexerOutput:
        """x [T, d] and the normed query latent [T, q_lora_rank]; both are detached here."""
        x, latent = x.detach(), latent.detach()
        queries, weights = self.query(x, latent, rotation)
        compressed = self.compressor(x, table, entry_rotation, axis)
        selected = self.ops.select_entries(queries, compressed.entries, weights, table, self.config.index_topk)
        return IndexerOutput(queries, weights, compressed, selected)

    def query(self, x: Tensor, latent: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, Hi, ci] and head weights [T, Hi] fp32, both scales folded in the weights."""
        heads, width = self.config.index_n_heads, self.config.index_head_dim
        queries = self.wq_b(latent).view(-1, heads, width)
        queries = self.ops.rotary(queries, rotation.cos, rotation.sin)
        scale = width**-0.5 * heads**-0.5
        return queries, self.weights_proj(x).to(self.compressor.ape.dtype) * scale
