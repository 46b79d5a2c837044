"""DeepSeek-V4 on a packed row of tokens: embedding, blocks, head, and the losses that train every parameter.

Single-device mathematics: nothing here knows of ranks. Parameters are fp32 masters under the published names
(experts stacked); activations are in `compute_dtype`, except what the reference code keeps in fp32: router,
hyper-connections, norm statistics, sinks, compressors and rotary tables.
Source: report section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fullweight.core.errors import ConfigError, DataError
from fullweight.core.role import ParameterRole
from fullweight.core.slicing import slice_targets
from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4.block import Block, MtpBlock, Sublayers
from fullweight.models.deepseek_v4.cache import Cache, DecodeContext
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.models.deepseek_v4.flops import IndexerLoss
from fullweight.models.deepseek_v4.hyper_connection import hyper_head, register_hyper_head
from fullweight.models.deepseek_v4.layers import Norm, Projection
from fullweight.models.deepseek_v4.moe import update_bias
from fullweight.models.deepseek_v4.parts import Part, parts_of
from fullweight.models.deepseek_v4.roles import parameter_role
from fullweight.models.deepseek_v4.tokens import WHOLE_ROW, TokenAxis
from fullweight.ops import resolve_operations
from fullweight.ops.reference import ReferenceOperations


@dataclass(frozen=True)
class ModelOutput:
    """What one packed row gives.

    losses: fp32 scalars, sums to be divided by `DeepSeekV4.loss_counts` of the global batch ("lm", and with
    gradients or on request "mtp", "indexer", "balance"). log_probs [T] fp32: log-probability of each
    position's target, no gradient. expert_counts [MoE layers, experts] int64: tokens routed, padding excluded;
    row i is main layer i, the MTP block's row comes last. dropped [MoE layers] int64: of those, the choices that
    found their expert at its capacity. Of a slice of a row, all of it is the slice's share.

    A part of the model that is not the last gives what the next one is to receive (`payload`; what it received
    beyond that is to be passed on), and of the rest its own blocks' share: no loss of the head, no log_probs, the
    rows of its own layers.
    """

    losses: dict[str, Tensor]
    log_probs: Tensor
    expert_counts: Tensor
    dropped: Tensor
    payload: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ParameterFacts:
    """Entries of a parameter, wherever they are held, and whether it trains."""

    size: int
    trains: bool


def parameters_of(model: nn.Module) -> dict[str, ParameterFacts]:
    """Every parameter by name, in order; those of the whole model also where only parts of it are held."""
    known: dict[str, ParameterFacts] = getattr(model, "every_parameter", {})
    return known or {n: ParameterFacts(p.numel(), p.requires_grad) for n, p in model.named_parameters()}


Watch = Callable[[str, Tensor], Tensor]
"""Told what passes between the pieces of a model in training, by piece and side; what it returns passes on.

Names are `embedding.leaving` and `embedding.following`, `layer-N.entering` and `.leaving`, `mtp.entering`,
`.following` and `.leaving`, `head.entering` and `.ahead`: streams [s, n, d], or [s, d] of the embedding, of what
follows and of what the MTP block hands to the head.
"""


class Absent(nn.Module):
    """The place of a module that another part of the model holds."""


class DeepSeekV4(nn.Module):
    """A DeepSeek-V4 model; weights are uninitialised until `initialise` or a checkpoint fills them.

    `ops` is a set of operations or its name ("auto" picks the fastest for a CPU); `indexer_loss` is over
    "selected" entries (sparse training), all "visible" ones (indexer warm-up) or "none". With `dense_csa` set
    (not with "selected"), CSA layers read every visible entry wherever losses are computed: DeepSeek-V3.2's
    dense warm-up. `axis` says which slice of a row is run here, and knows what lies outside; it is given whole
    rows all the same.
    """

    dense_csa: bool = False
    axis: TokenAxis = WHOLE_ROW
    watch: Watch | None = None

    def __init__(
        self,
        config: DeepSeekV4Config,
        compute_dtype: torch.dtype = torch.float32,
        *,
        indexer_loss: IndexerLoss = "selected",
        ops: str | ReferenceOperations = "auto",
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.indexer_loss = config, compute_dtype, indexer_loss
        self.ops = resolve_operations(ops) if isinstance(ops, str) else ops
        d, eps = config.hidden_size, config.rms_norm_eps
        self.embed = Projection(self.ops, d, config.vocab_size)
        self.layers = nn.ModuleList(
            Block(config, self.ops, i, indexer_loss) for i in range(config.num_hidden_layers)
        )
        self.norm = Norm(self.ops, d, eps)
        self.head = Projection(self.ops, d, config.vocab_size)
        register_hyper_head(self, config)
        self.mtp = nn.ModuleList(MtpBlock(config, self.ops) for _ in range(config.num_nextn_predict_layers))
        self.whole = parts_of([config.num_hidden_layers])[0]
        self.every_parameter: dict[str, ParameterFacts] = {}

    def keep(self, parts: Sequence[Part]) -> None:
        """Give up the blocks that none of `parts` runs; the others keep their names.

        What the whole model was is kept in `every_parameter`.
        """
        layers = {layer for part in parts for layer in part.layers}
        behind = any(part.is_last for part in parts)
        self.keep_pieces(layers, embedding=any(part.is_first for part in parts), head=behind, mtp=behind)

    def keep_pieces(self, layers: Collection[int], *, embedding: bool, head: bool, mtp: bool) -> None:
        """As `keep`, by piece: main layers by number, the embedding, the head with its norm, the MTP block."""
        self.every_parameter = self.every_parameter or parameters_of(self)
        for layer in range(len(self.layers)):
            if layer not in layers:
                self.layers[layer] = Absent()
        if not embedding:
            self.embed = Absent()  # type: ignore[assignment]
        if not head:
            self.norm, self.head = Absent(), Absent()  # type: ignore[assignment]
            for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
                delattr(self, name)
        if not mtp:
            self.mtp = nn.ModuleList(Absent() for _ in self.mtp)

    # ---- training -----------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        with_losses: bool | None = None,
        part: Part | None = None,
        received: tuple[Tensor, ...] = (),
    ) -> ModelOutput:
        """Losses of one packed row; the auxiliary ones by default only when gradients are on.

        A `part` runs its blocks only, on the payload that it `received` from the part before it.
        """
        part = self.whole if part is None else part
        with_losses = torch.is_grad_enabled() if with_losses is None else with_losses
        context = self.context(batch.tokens, batch.layout, with_losses)
        if part.is_first:
            embedded, following = self.embed_row(batch.tokens)
            streams = self.spread(embedded)
        else:
            streams, following = received[0], received[-1]
        for layer in part.layers:
            streams = self.run_layer(layer, streams, context)
        losses, log_probs = {}, streams.new_empty(0, dtype=torch.float32)
        if part.is_last:
            losses["lm"], log_probs = self.predict(streams, batch)
        if with_losses:
            if part.is_last and self.mtp:
                ahead = self.look_ahead(streams, following, batch, context)
                losses["mtp"] = self.predict_ahead(ahead, batch)
            losses |= context.aux.sums(streams.device)
        payload: tuple[Tensor, ...] = () if part.is_last else (streams,)
        if part.is_first and payload and self.mtp:
            payload = (streams, following.clone())  # no view: sharding hooks follow tensors, not their views
        counts, dropped = (torch.stack(values) for values in (context.aux.expert_counts, context.aux.dropped))
        return ModelOutput(losses, log_probs, counts, dropped, payload)

    def payload_shapes(self, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a part receives of a row of so many tokens, in the compute dtype.

        They are the streams and, where there is an MTP block to read it, the embedding of each token's next one.
        """
        here, width = num_tokens // self.axis.slice.count, self.config.hidden_size
        streams = (here, self.config.hc_mult, width)
        return (streams, (here, width)) if self.mtp else (streams,)

    def loss_counts(self, batch: Batch) -> dict[str, float]:
        """What each loss sum is divided by, summed over the global batch: known before the forward pass.

        Of the whole row, also where it is run in slices.
        """
        layout = batch.layout
        return {
            "lm": float(batch.targets()[1].sum()),
            "mtp": float(batch.targets(2)[1].sum()),
            "indexer": float(layout.num_tokens - layout.num_padding),
            "balance": float(layout.num_documents),
        }

    def update_router_bias(self, expert_counts: Tensor, speed: float) -> None:
        """Move each scored router's bias against the load unless it is frozen (`Gate.bias_trains`).

        expert_counts are as in ModelOutput, summed over the global batch.
        """
        for block, counts in zip([*self.layers, *self.mtp], expert_counts, strict=True):
            if isinstance(block, Sublayers) and block.ffn.gate.bias_trains:
                update_bias(block.ffn.gate.get_buffer("bias"), counts, speed)

    def set_expert_capacity(self, factor: float | None) -> None:
        """Let experts drop what is beyond `factor` times their even share of a row; None: nothing."""
        for block in (*self.layers, *self.mtp):
            assert isinstance(block, Sublayers)
            block.ffn.capacity_factor = factor

    def set_recompute(self, policy: Literal["none", "selective", "full"]) -> None:
        """What backward makes again: nothing, the routed experts, or whole blocks.

        A block whose streams carry no gradient (everything before it is frozen) keeps what little it needs. Ask
        before blocks are given up: what is before a block decides.
        """
        carries = self.embed.weight.requires_grad
        for block in (*self.layers, *self.mtp):
            assert isinstance(block, Sublayers)
            carries = carries or any(p.requires_grad for p in block.carriers())
            block.recompute = policy == "full" and carries
            block.ffn.recompute = policy == "selective"

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """How each parameter is optimised, by name."""
        return {name: parameter_role(name, self.config) for name, _ in self.named_parameters()}

    # ---- pieces of a training pass --------------------------------------------------------------------

    def embed_row(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [s, d] of the slice's tokens, and of the token after each (any, at the row's end)."""
        first, stop = self.axis.slice.bounds(tokens.shape[0])
        following = tokens[stop : stop + 1] if stop < len(tokens) else tokens[:1]
        embedded = self._embed(torch.cat((tokens[first:stop], following)))
        leaving, following = embedded[:-1], embedded[1:]
        return self._passing("embedding.leaving", leaving), self._passing("embedding.following", following)

    def spread(self, embedded: Tensor) -> Tensor:
        """Embedded tokens [T, d] to streams [T, n, d]."""
        return embedded.unsqueeze(1).repeat(1, self.config.hc_mult, 1)

    def run_layer(self, layer: int, streams: Tensor, context: Context) -> Tensor:
        """Streams [s, n, d] through main layer `layer`."""
        name = f"layer-{layer}"
        out: Tensor = self.layers[layer](self._passing(f"{name}.entering", streams), context)
        return self._passing(f"{name}.leaving", out)

    def look_ahead(self, streams: Tensor, following: Tensor, batch: Batch, context: Context) -> Tensor:
        """What the MTP block gives the head, [s, d], of the trunk's streams [s, n, d] and the embedding [s, d] of
        next tokens.
        """
        inside = self.has_next(batch)
        # a document's last token has no next one to read: it counts in no load and no loss
        context = replace(context, valid=context.valid & inside)
        following = self._passing("mtp.following", following * inside.unsqueeze(1).to(following.dtype))
        hidden: Tensor = self.mtp[0](self._passing("mtp.entering", streams), following, context)
        return self._passing("mtp.leaving", hidden)

    def has_next(self, batch: Batch) -> Tensor:
        """[s] bool: whether a token of the slice has one after it in its document."""
        positions = batch.layout.positions
        inside = torch.zeros_like(positions, dtype=torch.bool)
        inside[:-1] = positions[1:] == positions[:-1] + 1
        return inside[slice(*self.axis.slice.bounds(batch.num_tokens))]

    def predict(self, streams: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the next-token loss, log-probabilities [s]) from the trunk's streams [s, n, d]."""
        hidden = self._collapse(self._passing("head.entering", streams))
        return self._predict(hidden, *slice_targets(batch, self.axis.slice))

    def predict_ahead(self, ahead: Tensor, batch: Batch) -> Tensor:
        """Sum of the MTP loss from what `look_ahead` gives, through the shared head."""
        return self._predict(self._passing("head.ahead", ahead), *slice_targets(batch, self.axis.slice, 2))[0]

    def _passing(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.watch is None else self.watch(name, tensor)

    # ---- inference ----------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, documents: Sequence[Sequence[int]]) -> list[Tensor]:
        """Next-token logits [length, vocabulary] (fp32) of each document of token ids."""
        tokens, layout = self._pack(documents)
        hidden = self._collapse(
            self._trunk(self.spread(self._embed(tokens)), self.context(tokens, layout, with_losses=False))
        )
        lengths = list(layout.document_lengths)
        return [self.head(part).float() for part in hidden.split(lengths)]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Cache]:
        """Logits [B, vocabulary] after each prompt and a cache that can grow to `capacity` tokens a sequence."""
        tokens, layout = self._pack(prompts)
        like = torch.empty(0, dtype=self.compute_dtype, device=tokens.device)
        cache = Cache(self.config, len(prompts), capacity, like)
        context = self.context(tokens, layout, with_losses=False, cache=cache)
        hidden = self._collapse(self._trunk(self.spread(self._embed(tokens)), context))
        cache.lengths = torch.tensor(layout.document_lengths, device=tokens.device)
        last = torch.cumsum(cache.lengths, 0) - 1
        return self.head(hidden[last]).float(), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] after one more token [B] for each sequence of the cache."""
        context = cache.step(tokens)
        return self.head(self._collapse(self._trunk(self.spread(self._embed(tokens)), context))).float()

    # ---- parts --------------------------------------------------------------------------------------

    def _pack(self, documents: Sequence[Sequence[int]]) -> tuple[Tensor, PackedLayout]:
        if not documents or any(len(d) == 0 for d in documents):
            raise DataError("found an empty document; every document needs at least one token id")
        ids = [t for d in documents for t in d]
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            worst = max(ids) if min(ids) >= 0 else min(ids)
            raise DataError(f"token id {worst} is outside the vocabulary of {self.config.vocab_size}")
        tokens = torch.tensor(ids, dtype=torch.int64)
        device = self.norm.weight.device
        return tokens.to(device), PackedLayout.build([len(d) for d in documents], self.config.ratios).to(device)

    def context(
        self, tokens: Tensor, layout: PackedLayout, with_losses: bool, cache: Cache | None = None
    ) -> Context:
        missing = set(self.config.ratios) - set(layout.tables)
        if missing:
            raise ConfigError(f"the packed layout has no table for compression ratios {sorted(missing)}")
        capture = cache.layers if cache is not None else None
        dense = self.dense_csa and with_losses
        return Context.build(self.config, tokens, layout, with_losses, capture, axis=self.axis, dense_csa=dense)

    def _embed(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.embed.weight).to(self.compute_dtype)

    def _trunk(self, streams: Tensor, context: Context | DecodeContext) -> Tensor:
        """Streams [T, n, d] through all blocks."""
        for layer in self.whole.layers:
            streams = self.layers[layer](streams, context)
        return streams

    def _collapse(self, streams: Tensor) -> Tensor:
        return self.norm(hyper_head(self, self.config, self.ops, streams))

    def _predict(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.cross_entropy(hidden, self.head.weight, targets, weights.to(self.norm.weight.dtype))
