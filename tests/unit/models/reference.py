"""DeepSeek-V4 written from the formulas, in float64, one document at a time, with dense masks.

For what transformers lacks (MTP, the indexer's loss, the balance loss) and to check gradients through
torch.autograd. It shares no code with the package and spares no memory. Rotary tables are rounded to fp32, as
the released reference code keeps them. Weights come under the package's names (published, experts stacked).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fullweight.models.deepseek_v4.config import DeepSeekV4Config


@dataclass
class Sums:
    """Loss sums over documents, as the model reports them, and tokens per expert of each MoE."""

    lm: list[Tensor] = field(default_factory=list)
    mtp: list[Tensor] = field(default_factory=list)
    indexer: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def total(self, name: str) -> Tensor:
        return sum(getattr(self, name), start=torch.zeros((), dtype=torch.float64))


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def rotary_angles(config: DeepSeekV4Config, compressed: bool, positions: Tensor) -> Tensor:
    """[len(positions), pairs], every product rounded to fp32."""
    dim = config.qk_rope_head_dim
    frequencies = []
    for i in range(dim // 2):
        if not compressed:
            frequencies.append(config.rope_theta ** (-2 * i / dim))
            continue
        theta, scaling = config.compress_rope_theta, config.rope_scaling
        base = theta ** (-2 * i / dim)

        def corner(
            beta: float, theta: float = theta, original: int = scaling.original_max_position_embeddings
        ) -> float:
            return dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))

        low = max(math.floor(corner(scaling.beta_fast)), 0)
        high = min(math.ceil(corner(scaling.beta_slow)), dim - 1)
        ramp = min(max((i - low) / (high - low if high > low else 1e-3), 0.0), 1.0)
        frequencies.append(base * ((1 - ramp) + ramp / scaling.factor))
    return positions.float().unsqueeze(1) * torch.tensor(frequencies, dtype=torch.float32)


def rotate(x: Tensor, angles: Tensor, sign: float = 1.0) -> Tensor:
    """Turn the trailing channels of x [T, ..., c] as complex numbers."""
    dim = 2 * angles.shape[1]
    turn = torch.complex(torch.cos(angles).double(), sign * torch.sin(angles).double())
    turn = turn.view(turn.shape[0], *[1] * (x.dim() - 2), -1)
    pairs = torch.view_as_complex(x[..., -dim:].reshape(*x.shape[:-1], dim // 2, 2).contiguous())
    return torch.cat((x[..., :-dim], torch.view_as_real(pairs * turn).flatten(-2)), -1)


class DenseModel:
    """`weights` are float64 leaves; `run` adds one document's losses to a Sums."""

    def __init__(self, config: DeepSeekV4Config, weights: dict[str, Tensor], scope: str = "selected") -> None:
        self.config, self.weights, self.scope = config, weights, scope

    def run(self, tokens: list[int], sums: Sums, mask: list[float] | None = None) -> None:
        w, config = self.weights, self.config
        mask = [1.0] * len(tokens) if mask is None else mask
        ids = torch.tensor(tokens)
        streams = torch.stack([w["embed.weight"][ids]] * config.hc_mult, 1)
        for layer in range(config.num_hidden_layers):
            streams = self._block(f"layers.{layer}", layer, streams, ids, sums)
        logits = rms(self._head("", streams), w["norm.weight"], config.rms_norm_eps) @ w["head.weight"].T
        sums.logits.append(logits)
        for t in range(len(tokens) - 1):
            sums.lm.append(-mask[t + 1] * torch.log_softmax(logits[t], -1)[tokens[t + 1]])
        if config.num_nextn_predict_layers:
            self._mtp(streams, tokens, mask, sums)

    def _mtp(self, streams: Tensor, tokens: list[int], mask: list[float], sums: Sums) -> None:
        w, eps, ids = self.weights, self.config.rms_norm_eps, torch.tensor(tokens)
        following = torch.zeros_like(streams[:, 0])
        following[:-1] = w["embed.weight"][ids[1:]]
        token = rms(following, w["mtp.0.enorm.weight"], eps) @ w["mtp.0.e_proj.weight"].T
        states = rms(streams, w["mtp.0.hnorm.weight"], eps) @ w["mtp.0.h_proj.weight"].T
        out = self._block("mtp.0", self.config.num_hidden_layers, token[:, None] + states, ids, sums)
        hidden = rms(self._head("mtp.0.", out), w["mtp.0.norm.weight"], eps)
        for t in range(len(tokens) - 2):
            logits = w["head.weight"] @ hidden[t]
            sums.mtp.append(-mask[t + 2] * torch.log_softmax(logits, -1)[tokens[t + 2]])

    # ---- hyper-connections --------------------------------------------------------------------------

    def _maps(self, prefix: str, streams: Tensor) -> Tensor:
        flat = streams.flatten(1)
        return rms(flat, None, self.config.rms_norm_eps) @ self.weights[f"{prefix}fn"].T

    def _head(self, prefix: str, streams: Tensor) -> Tensor:
        w, name = self.weights, f"{prefix}hc_head_"
        gate = torch.sigmoid(w[name + "scale"] * self._maps(name, streams) + w[name + "base"])
        return ((gate + self.config.hc_eps).unsqueeze(-1) * streams).sum(1)

    def _sublayer(self, name: str, streams: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
        w, n, eps = self.weights, self.config.hc_mult, self.config.hc_eps
        z, base, scale = self._maps(name, streams), w[name + "base"], w[name + "scale"]
        pre = torch.sigmoid(scale[0] * z[:, :n] + base[:n]) + eps
        post = 2 * torch.sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])
        comb = torch.softmax((scale[2] * z[:, 2 * n :] + base[2 * n :]).view(-1, n, n), 2) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        y = function((pre.unsqueeze(-1) * streams).sum(1))
        return post.unsqueeze(-1) * y.unsqueeze(1) + comb.transpose(1, 2) @ streams

    def _block(self, name: str, layer: int, streams: Tensor, ids: Tensor, sums: Sums) -> Tensor:
        w, eps = self.weights, self.config.rms_norm_eps
        streams = self._sublayer(
            f"{name}.hc_attn_",
            streams,
            lambda x: self._attention(f"{name}.attn", layer, rms(x, w[f"{name}.attn_norm.weight"], eps), sums),
        )
        return self._sublayer(
            f"{name}.hc_ffn_",
            streams,
            lambda x: self._moe(f"{name}.ffn", layer, rms(x, w[f"{name}.ffn_norm.weight"], eps), ids, sums),
        )

    # ---- attention ----------------------------------------------------------------------------------

    def _attention(self, name: str, layer: int, x: Tensor, sums: Sums) -> Tensor:
        w, config = self.weights, self.config
        length, ratio, heads, c = (
            len(x),
            config.compress_ratios[layer],
            config.num_attention_heads,
            config.head_dim,
        )
        eps, time = config.rms_norm_eps, torch.arange(length)
        angles = rotary_angles(config, ratio > 0, time)
        latent = rms(x @ w[f"{name}.wq_a.weight"].T, w[f"{name}.q_norm.weight"], eps)
        q = rotate(rms((latent @ w[f"{name}.wq_b.weight"].T).view(length, heads, c), None, eps), angles)
        kv = rotate(rms(x @ w[f"{name}.wkv.weight"].T, w[f"{name}.kv_norm.weight"], eps), angles)
        back = time[:, None] - time[None, :]
        seen = (back >= 0) & (back < config.sliding_window)
        keys, visible, scores = kv, None, None
        if ratio:
            entries = self._compress(f"{name}.compressor", x, ratio, c)
            visible = torch.arange(len(entries))[None, :] < ((time + 1) // ratio)[:, None]
            chosen = visible
            if ratio == 4:
                scores = self._index(f"{name}.indexer", x.detach(), latent.detach())
                chosen = choose(scores.detach(), visible, config.index_topk)
            keys, seen = torch.cat((kv, entries)), torch.cat((seen, chosen), 1)
        logits = torch.einsum("thc,sc->ths", q, keys) / math.sqrt(c)
        sink = w[f"{name}.attn_sink"].view(1, -1, 1).expand(length, -1, 1)
        every = torch.softmax(torch.cat((logits.masked_fill(~seen[:, None], -torch.inf), sink), 2), 2)
        if scores is not None:
            dense = logits
            if self.scope == "selected":
                candidates = chosen
            else:  # all visible entries, weighed by the denominator of the sparse attention
                candidates = visible
                dense = logits - torch.logsumexp(
                    torch.cat((logits.masked_fill(~seen[:, None], -torch.inf), sink), 2), 2, keepdim=True
                )
            probabilities = every[..., length:-1] if self.scope == "selected" else dense[..., length:].exp()
            self._kl(probabilities.detach().sum(1), scores, candidates, sums)
        out = rotate(torch.einsum("ths,sc->thc", every[..., :-1], keys), angles, -1.0)
        groups, rank = config.o_groups, config.o_lora_rank
        per_group = out.reshape(length, groups, -1)
        wo_a = w[f"{name}.wo_a.weight"].view(groups, rank, -1)
        low = torch.cat([per_group[:, g] @ wo_a[g].T for g in range(groups)], 1)
        return low @ w[f"{name}.wo_b.weight"].T

    def _compress(self, name: str, x: Tensor, ratio: int, width: int) -> Tensor:
        w, config = self.weights, self.config
        values = x @ w[f"{name}.wkv.weight"].T
        gates = x @ w[f"{name}.wgate.weight"].T
        entries = []
        for i in range(len(x) // ratio):
            now = slice(ratio * i, ratio * (i + 1))
            value, gate = values[now], gates[now] + w[f"{name}.ape"]
            if ratio == 4:
                value, gate = value[:, width:], gate[:, width:]
                if i:
                    before = slice(ratio * (i - 1), ratio * i)
                    earlier = gates[before, :width] + w[f"{name}.ape"][:, :width]
                    value = torch.cat((values[before, :width], value))
                    gate = torch.cat((earlier, gate))
            pooled = (torch.softmax(gate, 0) * value).sum(0)
            normed = rms(pooled, w[f"{name}.norm.weight"], config.rms_norm_eps)
            entries.append(rotate(normed[None], rotary_angles(config, True, torch.tensor([ratio * i])))[0])
        return torch.stack(entries) if entries else x.new_zeros(0, width)

    def _index(self, name: str, x: Tensor, latent: Tensor) -> Tensor:
        w, config, heads, width = (
            self.weights,
            self.config,
            self.config.index_n_heads,
            self.config.index_head_dim,
        )
        keys = self._compress(f"{name}.compressor", x, 4, width)
        queries = (latent @ w[f"{name}.wq_b.weight"].T).view(-1, heads, width)
        queries = rotate(queries, rotary_angles(config, True, torch.arange(len(x))))
        weights = x @ w[f"{name}.weights_proj.weight"].T / math.sqrt(width * heads)
        return (weights[:, :, None] * torch.relu(queries @ keys.T)).sum(1)

    @staticmethod
    def _kl(mass: Tensor, scores: Tensor, candidates: Tensor, sums: Sums) -> None:
        for t in range(len(scores)):
            places = candidates[t].nonzero().flatten()
            if len(places):
                target = mass[t, places] / mass[t, places].sum()
                predicted = torch.log_softmax(scores[t, places], 0)
                sums.indexer.append((target * (target.log() - predicted)).sum())

    # ---- experts ------------------------------------------------------------------------------------

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        f, limit = self.config.moe_intermediate_size, self.config.swiglu_limit
        gate, up = gate_up[:f] @ x, gate_up[f:] @ x
        return down @ (F.silu(torch.clamp(gate, max=limit)) * torch.clamp(up, -limit, limit))

    def _moe(self, name: str, layer: int, x: Tensor, ids: Tensor, sums: Sums) -> Tensor:
        w, config = self.weights, self.config
        affinity = torch.sqrt(torch.log1p(torch.exp(x @ w[f"{name}.gate.weight"].T)))
        k, rows = config.num_experts_per_tok, []
        for t in range(len(x)):
            if config.is_hash_layer(layer):
                chosen = w[f"{name}.gate.tid2eid"][ids[t]]
            else:
                chosen = torch.topk(affinity[t] + w[f"{name}.gate.bias"], k).indices
            gain = config.routed_scaling_factor / affinity[t, chosen].sum()
            row = self._expert(x[t], w[f"{name}.shared_experts.gate_up"], w[f"{name}.shared_experts.down"])
            for e in chosen.tolist():
                y = self._expert(x[t], w[f"{name}.experts.gate_up"][e], w[f"{name}.experts.down"][e])
                row = row + gain * affinity[t, e] * y
            rows.append(row)
        if not config.is_hash_layer(layer):
            # a document's last token has no next one for the MTP block to read: it counts in no loss
            counted = affinity[:-1] if name.startswith("mtp") else affinity
            if len(counted):
                sums.balance.append(balance(counted, k))
        return torch.stack(rows)


def balance(affinity: Tensor, k: int) -> Tensor:
    """sum_i f_i P_i of one sequence; affinity [T, E]."""
    length, experts = affinity.shape
    fraction = torch.zeros(experts, dtype=torch.float64)
    for row in affinity:
        fraction[row.topk(k).indices] += experts / (k * length)
    return (fraction * (affinity / affinity.sum(1, keepdim=True)).mean(0)).sum()


def choose(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """Mask of the k best visible places of each row, ties to the lower index."""
    mask = torch.zeros_like(visible)
    for t, row in enumerate(scores.tolist()):
        places = [s for s in range(len(row)) if visible[t, s]]
        mask[t, sorted(places, key=lambda s: (-row[s], s))[:k]] = True
    return mask
