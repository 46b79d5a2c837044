"""The definition of every hot operation, in plain differentiable torch.

Each method of `ReferenceOperations` is the contract that a device's faster version must meet, and runs on any
device. Memory stays linear in tokens: attention, the indexer and the cross-entropy go over the row in
chunks and recompute a chunk in backward. Speed is left to the subclasses.

Shape letters: T tokens, E compressed entries, H heads, c head_dim, d hidden size, n hyper-connection streams,
K experts per token, k selected entries per token, V vocabulary.
Source: DeepSeek-V4 technical report, sections 2.2 (hyper-connections), 2.3 (attention), 2.4 (experts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.ops.late import split
from fullweight.ops.linear import CastLinear, GroupedLinear, WideLinear

QUERY_CHUNK = 256  # queries whose scores exist at the same time
TOKEN_CHUNK = 1024  # tokens whose logits exist at the same time

GROUPS: dict[str, tuple[str, ...]] = {
    "linear": ("linear", "wide_linear", "grouped_linear"),
    "norm_rotary": ("rms_norm", "rotary", "norm_rotary"),
    "swiglu": ("swiglu",),
    "hyper_connection": ("hyper_pre", "hyper_post", "hyper_head", "hyper_mix", "sinkhorn"),
    "compress": ("compress",),
    "indexer": ("index_scores", "select_entries", "indexer_loss", "dense_indexer_loss"),
    "attention": ("attention",),
    "experts": ("experts",),
    "cross_entropy": ("cross_entropy",),
}
"""What a recipe chooses together, and the operations in it."""


@dataclass(frozen=True)
class Workload:
    """What decides whether a set can do a group's operations: compute type, attention's heads of one rank, the
    indexer's heads and how many entries it chooses."""

    dtype: torch.dtype
    num_heads: int
    head_dim: int
    index_heads: int
    index_head_dim: int
    index_topk: int


@dataclass(frozen=True)
class Compressed:
    """The compressed side of an attention layer: entries, and which of them each token attends to.

    entries [E, c]; selected [T, k] int64 entry indices, ascending, -1 last for unused places, or None when
    a token attends to every entry that `table` shows it (HCA).
    """

    entries: Tensor
    table: CompressionTable
    selected: Tensor | None = None


@dataclass(frozen=True)
class AttentionOutput:
    """out [T, H, c], rotated back; lse [T, H] fp32 log of the softmax denominator, sink included;
    mass [T, k] fp32 attention probability of each selected entry summed over heads (no gradient), or None."""

    out: Tensor
    lse: Tensor
    mass: Tensor | None


@dataclass(frozen=True)
class HyperOutput:
    """One sublayer's hyper-connection: its input [T, d], and post [T, n], comb [T, n, n] and pre [T, n] fp32.

    `pre` carries no gradient of its own: with it `hyper_mix` makes the input again.
    """

    input: Tensor
    post: Tensor
    comb: Tensor
    pre: Tensor


def chunks(total: int, size: int) -> list[tuple[int, int]]:
    """Half-open ranges of at most `size` that cover range(total)."""
    return [(a, min(a + size, total)) for a in range(0, total, size)]


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function whose intermediates are recomputed in backward instead of being kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class ReferenceOperations:
    """Plain torch. `name` is what recipes, `doctor` and the ledger call this set of operations."""

    name = "reference"
    torch_alone = False
    """Whether a set that is made for a device is torch's own operations throughout, which take any tensors."""

    @classmethod
    def for_group(cls, group: str) -> Self:
        """The set, where `group` asks for it by name."""
        return cls()

    def has_own(self, group: str) -> bool:
        """Whether this set does any of the group's operations itself."""
        return any(getattr(type(self), m) is not getattr(ReferenceOperations, m) for m in GROUPS[group])

    def takes(self, group: str, workload: Workload) -> bool:
        """Whether this set can do the group's operations; "auto" leaves those that it cannot to the reference."""
        return True

    def part(self, group: str) -> ReferenceOperations:
        """The set that does the group's operations."""
        return self

    # ---- projections and element-wise ---------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., in] @ weight [out, in] transposed, in x's dtype (weight is cast, its gradient is not)."""
        weight, late = split(x, weight)
        return F.linear(x, weight.to(x.dtype)) if late is None else CastLinear.apply(x, weight, late)

    def wide_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., in] @ weight [out, in] transposed, in weight's dtype (fp32 whatever x is)."""
        weight, late = split(x, weight)
        return (
            F.linear(x.to(weight.dtype), weight) if late is None else WideLinear.apply(x, weight, late, F.linear)
        )

    def grouped_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Block-diagonal projection: x [T, g, in], weight [g * out, in] -> [T, g * out]."""
        weight, late = split(x, weight)
        if late is not None:
            return GroupedLinear.apply(x, weight, late)
        groups = x.shape[1]
        blocks = weight.to(x.dtype).view(groups, -1, x.shape[-1])
        return torch.bmm(x.transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1).flatten(1)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps) over the last dim, statistics in fp32, result in x's dtype."""
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed if weight is None else normed * weight.to(wide.dtype)).to(x.dtype)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the trailing 2*R channels of x [T, ..., c] by pairs (2i, 2i+1); cos, sin [T, R] fp32.

        Pass -sin to rotate back.
        """
        pairs = cos.shape[-1]
        shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (pairs,)
        cos, sin = cos.view(shape), sin.view(shape)
        plain, turned = x[..., : -2 * pairs], x[..., -2 * pairs :].to(torch.promote_types(x.dtype, cos.dtype))
        even, odd = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        return torch.cat((plain, turned.to(x.dtype)), -1)

    def norm_rotary(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotary(rms_norm(x))`: what every query and key goes through."""
        return self.rotary(self.rms_norm(x, weight, eps), cos, sin)

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        """silu(min(gate, limit)) * clamp(up, -limit, limit) for gate_up [..., 2f] -> [..., f]."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    # ---- hyper-connections (report 2.2) -------------------------------------------------------------

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
        """Mix streams [T, n, d] into a sublayer's input and make the weights of `hyper_post`.

        fn [(2+n)n, n*d], base [(2+n)n], scale [3], all fp32. comb is doubly stochastic by `iters` Sinkhorn
        rounds; entry (j, k) is what stream j gives to stream k.
        """
        n = streams.shape[1]
        z = self._hyper_logits(streams, fn, norm_eps)
        pre, post, comb = z.split((n, n, n * n), -1)
        base_pre, base_post, base_comb = base.to(z.dtype).split((n, n, n * n))
        pre = torch.sigmoid(scale[0] * pre + base_pre) + eps
        post = 2 * torch.sigmoid(scale[1] * post + base_post)
        comb = self.sinkhorn((scale[2] * comb + base_comb).view(-1, n, n), iters, eps)
        return HyperOutput(self.hyper_mix(streams, pre), post, comb, pre.detach())

    def sinkhorn(self, logits: Tensor, iters: int, eps: float) -> Tensor:
        """logits [T, n, n] to doubly stochastic matrices: a softmax over rows, then columns and rows in turn."""
        comb = torch.softmax(logits, -1) + eps
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        return comb

    def hyper_post(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """streams'[k] = post[k] * y + sum_j comb[j, k] * streams[j]; y [T, d]."""
        mixed = torch.einsum("tjk,tjd->tkd", comb, streams.to(comb.dtype))
        return (mixed + post.unsqueeze(-1) * y.to(comb.dtype).unsqueeze(1)).to(streams.dtype)

    def hyper_head(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        """Collapse streams [T, n, d] to [T, d]; fn [n, n*d], base [n], scale [1]."""
        z = self._hyper_logits(streams, fn, norm_eps)
        return self.hyper_mix(streams, torch.sigmoid(scale * z + base) + eps)

    def _hyper_logits(self, streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
        flat = streams.flatten(1).to(fn.dtype)
        return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)

    def hyper_mix(self, streams: Tensor, pre: Tensor) -> Tensor:
        """sum_i pre[i] * streams[i]: streams [T, n, d], pre [T, n] -> [T, d]."""
        return torch.einsum("tn,tnd->td", pre, streams.to(pre.dtype)).to(streams.dtype)

    # ---- attention (report 2.3) ---------------------------------------------------------------------

    def compress(
        self, values: Tensor, gates: Tensor, ape: Tensor, table: CompressionTable, overlap: bool
    ) -> Tensor:
        """Gated pooling of windows of m tokens into entries; fp32.

        values, gates [T, W], ape [m, W]. Without overlap (HCA, W = c) entry = sum_j softmax_j(gate + ape) *
        value, per channel. With it (CSA, W = 2c) the softmax runs jointly over the previous window's first
        half of the channels and this window's second half; a document's first window has no previous one.
        Returns [E, c] before its norm.
        """
        ratio, width = ape.shape
        index = table.entry_tokens.unsqueeze(1) + torch.arange(ratio, device=values.device)
        value, gate = values[index], gates[index] + ape.to(gates.dtype)
        if overlap:
            half = width // 2
            first = (table.entry_positions == 0).view(-1, 1, 1)
            earlier = (index - ratio).clamp(min=0)
            before = gates[earlier][..., :half] + ape[:, :half].to(gates.dtype)
            before = before.masked_fill(first, float("-inf"))
            value = torch.cat((values[earlier][..., :half].masked_fill(first, 0.0), value[..., half:]), 1)
            gate = torch.cat((before, gate[..., half:]), 1)
        return (torch.softmax(gate, 1) * value).sum(1)

    def index_scores(self, queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        """I[t, s] = sum_h weights[t, h] * relu(queries[t, h] . keys[s]) in fp32; [t, Hi, ci], [s, ci], [t, Hi]."""
        products = torch.matmul(queries, keys.T)
        return torch.einsum("th,ths->ts", weights, torch.relu(products).to(weights.dtype))

    @torch.no_grad()
    def select_entries(
        self, queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int
    ) -> Tensor:
        """The `topk` visible entries of highest index score for each token, ties to the lower index.

        queries [T, Hi, ci], keys [E, ci], weights [T, Hi] fp32 -> [T, min(topk, E)] int64, ascending, -1 last.
        """
        num_entries = keys.shape[0]
        width = min(topk, num_entries)
        result = torch.empty(queries.shape[0], width, dtype=torch.int64, device=queries.device)
        entry = torch.arange(num_entries, device=queries.device)
        for a, b in chunks(queries.shape[0], QUERY_CHUNK):
            scores = self.index_scores(queries[a:b], keys, weights[a:b])
            hidden = (entry < table.entry_begin[a:b, None]) | (entry >= table.entry_end[a:b, None])
            order = scores.masked_fill(hidden, float("-inf")).sort(dim=-1, descending=True, stable=True)
            picked = order.indices[:, :width]
            unseen = hidden.gather(1, picked)
            picked = picked.masked_fill(unseen, num_entries).sort(-1).values
            result[a:b] = picked.masked_fill(picked == num_entries, -1)
        return result

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
        """Shared-KV attention over the last `window` tokens of the document, compressed entries and a sink.

        q [T, H, c], kv [F + T, c] (key and value), sink [H] fp32. The first F rows of kv (at most `window`) are
        tokens before the first query, which a layout with negative `document_starts` reaches. Logits are
        q.k / sqrt(c); the sink adds exp(sink[h]) to the denominator and has no value. The output is rotated
        back by `turn`, the (cos, sin) that q was rotated by.
        """
        parts = []
        for a, b in chunks(q.shape[0], QUERY_CHUNK):
            parts.append(recomputed(self._attend, q, kv, sink, layout, window, compressed, a, b))
        out, lse, mass = zip(*parts, strict=True)
        selected = compressed is not None and compressed.selected is not None
        turned = self.rotary(torch.cat(out), turn[0], -turn[1])
        return AttentionOutput(turned, torch.cat(lse), torch.cat(mass) if selected else None)

    def _attend(
        self,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        layout: PackedLayout,
        window: int,
        compressed: Compressed | None,
        a: int,
        b: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        token = torch.arange(a, b, device=q.device).unsqueeze(1)
        index = token + torch.arange(1 - window, 1, device=q.device)
        front = kv.shape[0] - q.shape[0]
        keys, seen = kv[(index + front).clamp(min=0)], index >= layout.document_starts[a:b, None]
        if compressed is not None:
            more, more_seen = self._compressed_keys(compressed, a, b)
            keys, seen = torch.cat((keys, more), 1), torch.cat((seen, more_seen), 1)
        scores = torch.einsum("thc,tsc->ths", q[a:b], keys).to(sink.dtype) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
        logits = torch.cat((scores, sink.view(1, -1, 1).expand(b - a, -1, 1)), -1)
        lse = torch.logsumexp(logits, -1)
        probabilities = torch.exp(scores - lse.unsqueeze(-1))
        out = torch.einsum("ths,tsc->thc", probabilities.to(q.dtype), keys)
        mass = probabilities[..., window:].sum(1).detach() if compressed is not None else None
        return out, lse.detach(), mass

    def _compressed_keys(self, compressed: Compressed, a: int, b: int) -> tuple[Tensor, Tensor]:
        table, entries, selected = compressed.table, compressed.entries, compressed.selected
        if selected is not None:
            return entries[selected[a:b].clamp(min=0)], selected[a:b] >= 0
        entry = torch.arange(entries.shape[0], device=entries.device)
        seen = (entry >= table.entry_begin[a:b, None]) & (entry < table.entry_end[a:b, None])
        return entries.expand(b - a, -1, -1), seen

    # ---- indexer loss (report 2.3.1; the loss itself is DeepSeek-V3.2's) ----------------------------

    def indexer_loss(
        self, queries: Tensor, keys: Tensor, weights: Tensor, selected: Tensor, mass: Tensor, num_tokens: int
    ) -> Tensor:
        """Sum over the first `num_tokens` tokens of KL(p || softmax(I)) over each token's selected entries.

        p is `mass` [T, k] L1-normalised (no gradient); a token that gives its entries no probability at all,
        or sees none, adds nothing. The gradient reaches queries, keys and weights only.
        """
        total = queries.new_zeros((), dtype=weights.dtype)
        # no tokens still give a graph: ranks that share a row go backward together
        for a, b in chunks(num_tokens, QUERY_CHUNK) or [(0, 0)]:
            args = (queries[a:b], keys, weights[a:b], selected[a:b], mass[a:b])
            total = total + recomputed(self._selected_loss, *args)
        return total

    def _selected_loss(
        self, queries: Tensor, keys: Tensor, weights: Tensor, selected: Tensor, mass: Tensor
    ) -> Tensor:
        seen = selected >= 0
        picked = keys[selected.clamp(min=0)]
        products = torch.relu(torch.einsum("thc,tsc->ths", queries, picked)).to(weights.dtype)
        return kl_divergence(mass, torch.einsum("th,ths->ts", weights, products), seen)

    def dense_indexer_loss(
        self,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        q: Tensor,
        lse: Tensor,
        compressed: Compressed,
        num_tokens: int,
    ) -> Tensor:
        """As `indexer_loss` over every visible entry: the warm-up stage.

        The target is recomputed from the main attention's q [T, H, c], entries and lse [T, H].
        """
        total = queries.new_zeros((), dtype=weights.dtype)
        for a, b in chunks(num_tokens, QUERY_CHUNK) or [(0, 0)]:
            with torch.no_grad():
                every, seen = self._compressed_keys(Compressed(compressed.entries, compressed.table), a, b)
                scores = torch.einsum("thc,tsc->ths", q[a:b], every).to(lse.dtype) * q.shape[-1] ** -0.5
                mass = torch.exp(scores - lse[a:b, :, None]).sum(1).masked_fill(~seen, 0.0)

            def chunk_loss(queries: Tensor, keys: Tensor, weights: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
                return kl_divergence(mass, self.index_scores(queries, keys, weights), seen)

            total = total + recomputed(chunk_loss, queries[a:b], keys, weights[a:b], mass, seen)
        return total

    # ---- experts and head ---------------------------------------------------------------------------

    def experts(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        """Sum over a token's experts of weights * down(swiglu(gate_up(x))).

        x [T, d], chosen [T, K] int64, weights [T, K] fp32, gate_up [X, 2f, d], down [X, d, f] -> [T, d].
        The number X in `chosen` is no expert, and its weight must be 0.
        """
        out = torch.zeros_like(x)
        for expert in range(gate_up.shape[0]):
            token, place = torch.where(chosen == expert)
            hidden = self.swiglu(self.linear(x[token], gate_up[expert]), limit)
            scaled = (hidden.to(weights.dtype) * weights[token, place, None]).to(x.dtype)
            out = out.index_add(0, token, self.linear(scaled, down[expert]))
        return out

    def cross_entropy(
        self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum of weights * -log p(target), log p(target) [T] fp32 without gradient), logits in chunks.

        hidden [T, d], head [V, d], targets [T] int64, weights [T] fp32.
        """
        total = hidden.new_zeros((), dtype=weights.dtype)
        log_probs = []
        for a, b in chunks(hidden.shape[0], TOKEN_CHUNK):

            def chunk_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
                logits = F.linear(hidden, head.to(hidden.dtype)).to(weights.dtype)
                return -F.cross_entropy(logits, target, reduction="none")

            chunk = recomputed(chunk_loss, hidden[a:b], head, targets[a:b])
            total = total - (chunk * weights[a:b]).sum()
            log_probs.append(chunk.detach())
        return total, torch.cat(log_probs)


def kl_divergence(mass: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    """Sum over rows of KL(mass / sum(mass) || softmax(scores)) over the `seen` places; all [t, s]."""
    mass = mass.masked_fill(~seen, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = torch.where(total > 0, mass / total.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    log_predicted = torch.log_softmax(scores, -1)
    return torch.where(target > 0, target * (target.clamp(min=1e-37).log() - log_predicted), 0.0).sum()
