"""Attention with one shared key-value head: sliding window, plus compressed entries in CSA and HCA layers.

Source: report section 2.3. Queries are low-rank; keys are values; rotation is undone on the output, so that
what an entry contributes depends on relative position only; the output projection is block-diagonal over
groups of heads and then mixes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullweight.models.deepseek_v4.cache import DecodeContext, LayerCache
from fullweight.models.deepseek_v4.compressor import Compressor
from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.context import Context
from fullweight.models.deepseek_v4.indexer import Indexer, IndexerOutput
from fullweight.models.deepseek_v4.layers import Norm, Projection
from fullweight.models.deepseek_v4.rotary import Rotation
from fullweight.ops.recompute import keep
from fullweight.ops.reference import AttentionOutput, Compressed, ReferenceOperations


class Attention(nn.Module):
    """One layer's attention; `indexer_loss` is over "selected" or all "visible" entries, or "none"."""

    def __init__(self, config: DeepSeekV4Config, ops: ReferenceOperations, layer: int, indexer_loss: str) -> None:
        super().__init__()
        self.config, self.ops, self.layer, self.indexer_loss = config, ops, layer, indexer_loss
        d, c, heads, eps = (
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.rms_norm_eps,
        )
        self.kind = config.layer_kind(layer)
        self.ratio = config.compress_ratios[layer]
        self.wq_a = Projection(ops, d, config.q_lora_rank)
        self.q_norm = Norm(ops, config.q_lora_rank, eps)
        self.wq_b = Projection(ops, config.q_lora_rank, heads * c)
        self.wkv = Projection(ops, d, c)
        self.kv_norm = Norm(ops, c, eps)
        groups, rank = config.o_groups, config.o_lora_rank
        self.wo_a = Projection(ops, heads * c // groups, groups * rank, groups)
        self.wo_b = Projection(ops, groups * rank, d)
        self.attn_sink = nn.Parameter(torch.empty(heads))
        if self.kind is not LayerKind.SLIDING:
            self.compressor = Compressor(config, ops, self.ratio, c)
        if self.kind is LayerKind.CSA:
            self.indexer = Indexer(config, ops)

    def forward(self, x: Tensor, context: Context | DecodeContext) -> Tensor:
        """x [T, d] -> [T, d]; in a DecodeContext T counts sequences, one new token each."""
        sliding = self.kind is LayerKind.SLIDING
        rotation = context.main if sliding else context.compress
        latent = keep(self.q_norm, self.wq_a(x))
        kv = keep(self._turn_keys, self.wkv(x), rotation.cos, rotation.sin)
        if isinstance(context, DecodeContext):
            q = self._turn_queries(self._queries(latent, self.wq_b.weight), rotation.cos, rotation.sin)
            out = self._decode(x, latent, q, kv, context)
            out = self.ops.rotary(out, rotation.cos, -rotation.sin)
            return self._output(out, self.wo_a.weight, self.wo_b.weight)
        axis, rotation = context.axis, context.span.main if sliding else context.span.compress
        q = keep(self._queries, axis.widen(latent), axis.own(self.wq_b.weight))
        q = keep(self._turn_queries, q, rotation.cos, rotation.sin)
        out = self._packed(x, latent, q, kv, rotation, context)
        return axis.narrow(self._output(out, axis.own(self.wo_a.weight), axis.own(self.wo_b.weight)))

    def _queries(self, latent: Tensor, weight: Tensor) -> Tensor:
        return self.ops.linear(latent, weight).unflatten(-1, (-1, self.config.head_dim))

    def _turn_queries(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.ops.norm_rotary(q, None, self.config.rms_norm_eps, cos, sin)

    def _turn_keys(self, kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.ops.norm_rotary(kv, self.kv_norm.weight, self.kv_norm.eps, cos, sin)

    def _output(self, out: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
        """out [T, h, c] of some heads, by the matrices' parts for their groups: [T, d], a part of the sum."""
        if self.config.o_groups > 1:
            heads = self.config.num_attention_heads // self.config.o_groups
            mixed = self.ops.grouped_linear(out.unflatten(1, (-1, heads)).flatten(2), wo_a)
        else:
            mixed = self.ops.linear(out.flatten(1), wo_a)
        return keep(self.ops.linear, mixed, wo_b)

    def _packed(
        self, x: Tensor, latent: Tensor, q: Tensor, kv: Tensor, rotation: Rotation, context: Context
    ) -> Tensor:
        """Attention of the span's queries q [S, h, c], rotated by `rotation`, for the local heads."""
        compressed, index, axis, span = None, None, context.axis, context.span.layout
        capture = context.capture[self.layer] if context.capture is not None else None
        if capture is not None:
            capture.fill_window(kv, context.layout)
        if self.kind is not LayerKind.SLIDING:
            table, entry_rotation = context.layout.tables[self.ratio], context.entries[self.ratio]
            pooled = self.compressor(x, table, entry_rotation, axis)
            if self.kind is LayerKind.CSA:
                index = self.indexer(x, latent, table, context.compress, entry_rotation, axis)
            selected = axis.widen(index.selected) if index is not None and not context.dense_csa else None
            compressed = Compressed(pooled.entries, span.tables[self.ratio], selected)
            if capture is not None:
                capture.main.fill(pooled, context.layout)
                if index is not None:
                    capture.index.fill(index.compressed, context.layout)
        window = self.config.sliding_window
        keys = axis.before_span(window - 1, axis.widen(kv))
        turn = (rotation.cos, rotation.sin)
        result = self.ops.attention(q, keys, axis.own_heads(self.attn_sink), span, window, turn, compressed)
        if index is not None and compressed is not None and context.with_losses:
            self._train_indexer(index, q, result, compressed, context)
        return result.out

    def _train_indexer(
        self,
        index: IndexerOutput,
        q: Tensor,
        result: AttentionOutput,
        compressed: Compressed,
        context: Context,
    ) -> None:
        """The indexer learns from the slice's own tokens, of whose attention it needs all heads."""
        tokens, axis = context.layout.num_tokens - context.layout.num_padding, context.axis
        keys = index.compressed.entries
        if self.indexer_loss == "selected":
            assert result.mass is not None
            mass = axis.narrow(result.mass)
            loss = self.ops.indexer_loss(index.queries, keys, index.weights, index.selected, mass, tokens)
        elif self.indexer_loss == "visible":
            heads = axis.all_heads(q), axis.all_heads(result.lse)
            target = Compressed(compressed.entries, context.layout.tables[self.ratio])
            loss = self.ops.dense_indexer_loss(index.queries, keys, index.weights, *heads, target, tokens)
        else:
            return
        context.aux.indexer.append(loss)

    def _decode(self, x: Tensor, latent: Tensor, q: Tensor, kv: Tensor, context: DecodeContext) -> Tensor:
        cache: LayerCache = context.layers[self.layer]
        keys, seen = cache.append_window(kv, context.positions)
        if self.kind is not LayerKind.SLIDING:
            entries, entry_seen = cache.main.append(self.compressor, x, context)
            if self.kind is LayerKind.CSA:
                index_keys, _ = cache.index.append(self.indexer.compressor, x, context)
                queries, weights = self.indexer.query(x, latent, context.compress)
                entry_seen = cache.select(queries, weights, index_keys, entry_seen, self.config.index_topk)
            keys, seen = torch.cat((keys, entries), 1), torch.cat((seen, entry_seen), 1)
        wide = self.attn_sink.dtype
        scores = torch.einsum("bhc,bsc->bhs", q, keys).to(wide) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
        logits = torch.cat((scores, self.attn_sink.view(1, -1, 1).expand(q.shape[0], -1, 1)), -1)
        probabilities = torch.softmax(logits, -1)[..., :-1]
        return torch.einsum("bhs,bsc->bhc", probabilities.to(q.dtype), keys)
