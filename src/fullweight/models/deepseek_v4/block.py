"""One transformer block and the multi-token-prediction (MTP) block built on it.

Source: report sections 2.1, 2.2 (two sublayers, each with its own hyper-connection) and DeepSeek-V3 section
2.2 (MTP): the MTP block reads the trunk's streams before they are collapsed and the embedding of the next
token, and predicts the token after it through the shared head.
"""

from __future__ import annotations

from torch import Tensor, nn

from fullweight.models.deepseek_v4.attention import Attention
from fullweight.models.deepseek_v4.cache import DecodeContext
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.models.deepseek_v4.hyper_connection import (
    hyper_head,
    hyper_pre,
    register_hyper_connection,
    register_hyper_head,
)
from fullweight.models.deepseek_v4.indexer import Indexer
from fullweight.models.deepseek_v4.layers import Norm, Projection
from fullweight.models.deepseek_v4.moe import MoE
from fullweight.ops.recompute import keep, recipes, remade
from fullweight.ops.reference import ReferenceOperations


class Sublayers(nn.Module):
    """Attention and experts, each between a hyper-connection's pre and post.

    With `recompute` backward has the block's input alone and makes the rest again.
    """

    recompute: bool = False

    def __init__(
        self, config: DeepSeekV4Config, ops: ReferenceOperations, layer: int, indexer_loss: str = "none"
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.attn = Attention(config, ops, layer, indexer_loss)
        self.attn_norm = Norm(ops, config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, ops, config.is_hash_layer(layer))
        self.ffn_norm = Norm(ops, config.hidden_size, config.rms_norm_eps)
        register_hyper_connection(self, "hc_attn", config)
        register_hyper_connection(self, "hc_ffn", config)

    def carriers(self) -> list[nn.Parameter]:
        """Parameters whose gradients come through the streams: all but the indexer's, which has its own loss."""
        indexers = [module for module in self.modules() if isinstance(module, Indexer)]
        own = {id(p) for indexer in indexers for p in indexer.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def mix(self, streams: Tensor, context: Context | DecodeContext) -> Tensor:
        """streams [T, n, d] -> [T, n, d]."""
        if self.recompute and isinstance(context, Context):
            return remade(self._mix, streams, context, again=context.aux.muted)
        return self._mix(streams, context)

    def _mix(self, streams: Tensor, context: Context | DecodeContext) -> Tensor:
        with recipes():
            first = hyper_pre(self, "hc_attn", self.config, self.ops, streams)
            y = self.attn(keep(self.attn_norm, first.input), context)
            middle = keep(self.ops.hyper_post, streams, y, first.post, first.comb)
            second = hyper_pre(self, "hc_ffn", self.config, self.ops, middle)
            y = self.ffn(keep(self.ffn_norm, second.input), context)
            return self.ops.hyper_post(middle, y, second.post, second.comb)


class Block(Sublayers):
    """A main layer."""

    def forward(self, streams: Tensor, context: Context | DecodeContext) -> Tensor:
        """streams [T, n, d] -> [T, n, d]; in a DecodeContext T counts sequences, one new token each."""
        return self.mix(streams, context)


class MtpBlock(Sublayers):
    """Depth-1 multi-token prediction; shares embedding and head with the trunk."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations) -> None:
        super().__init__(config, ops, config.num_hidden_layers)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = Projection(ops, d, d), Projection(ops, d, d)
        self.enorm, self.hnorm = Norm(ops, d, eps), Norm(ops, d, eps)
        self.norm = Norm(ops, d, eps)
        register_hyper_head(self, config)

    def forward(self, streams: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """Trunk streams [T, n, d] and embedded next tokens [T, d] to the head's input [T, d]."""
        token = self.e_proj(self.enorm(embedded)).unsqueeze(1)
        with recipes():
            mixed = token + self.h_proj(keep(self.hnorm, streams))
        streams = self.mix(mixed, context)
        return self.norm(hyper_head(self, self.config, self.ops, streams))
