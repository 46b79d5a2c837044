"""The contract of every operation as a plain float64 formula: loops over tokens, documents known by their start.

Shares nothing with the package but the layout's document lengths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fullweight.core.types import PackedLayout


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs as complex numbers times cos + i sin, on the trailing channels."""
    dim = 2 * cos.shape[1]
    turn = torch.complex(cos, sin).view(len(x), *[1] * (x.dim() - 2), -1)
    pairs = torch.view_as_complex(x[..., -dim:].reshape(*x.shape[:-1], dim // 2, 2).contiguous())
    return torch.cat((x[..., :-dim], torch.view_as_real(pairs * turn).flatten(-2)), -1)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    f = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :f], gate_up[..., f:]
    gate = torch.where(gate > limit, limit, gate)
    return gate / (1 + torch.exp(-gate)) * torch.where(up.abs() > limit, limit * up.sign(), up)


def hyper_logits(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    return rms_norm(streams.flatten(1), None, norm_eps) @ fn.T


def hyper_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    z = hyper_logits(streams, fn, norm_eps)
    pre = 1 / (1 + torch.exp(-(scale[0] * z[:, :n] + base[:n]))) + eps
    post = 2 / (1 + torch.exp(-(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])))
    raw = torch.exp(scale[2] * z[:, 2 * n :] + base[2 * n :]).view(-1, n, n)
    comb = raw / raw.sum(2, keepdim=True) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return sum(pre[:, i, None] * streams[:, i] for i in range(n)), post, comb


def hyper_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    n = streams.shape[1]
    rows = []
    for k in range(n):
        rows.append(post[:, k, None] * y + sum(comb[:, j, k, None] * streams[:, j] for j in range(n)))
    return torch.stack(rows, 1)


def hyper_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    weight = 1 / (1 + torch.exp(-(scale * hyper_logits(streams, fn, norm_eps) + base))) + eps
    return (weight[:, :, None] * streams).sum(1)


def compress(values: Tensor, gates: Tensor, ape: Tensor, layout: PackedLayout, overlap: bool) -> Tensor:
    """Entries of all documents, in order; fewer than the row's T // ratio, which are padded with anything."""
    ratio, width = ape.shape
    half = width // 2
    entries, start = [], 0
    for length in layout.document_lengths:
        for i in range(length // ratio):
            now = slice(start + ratio * i, start + ratio * (i + 1))
            value, gate = values[now], gates[now] + ape
            if overlap:
                value, gate = value[:, half:], gate[:, half:]
                if i:
                    before = slice(now.start - ratio, now.start)
                    value = torch.cat((values[before, :half], value))
                    gate = torch.cat((gates[before, :half] + ape[:, :half], gate))
            weight = torch.exp(gate - gate.amax(0))
            entries.append((weight * value).sum(0) / weight.sum(0))
        start += length
    return torch.stack(entries) if entries else values.new_zeros(0, half if overlap else width)


def visible_entries(layout: PackedLayout, ratio: int) -> list[list[int]]:
    """Row-wide indices of the entries that each token sees: its document's windows that have ended."""
    result, first = [], 0
    for length in layout.document_lengths:
        result += [list(range(first, first + (t + 1) // ratio)) for t in range(length)]
        first += length // ratio
    return result


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    dots = queries @ keys.T
    return (weights[:, :, None] * torch.where(dots > 0, dots, 0.0)).sum(1)


def select_entries(scores: Tensor, visible: list[list[int]], topk: int, width: int) -> list[list[int]]:
    rows = []
    for row, places in zip(scores.tolist(), visible, strict=True):
        chosen = sorted(sorted(places, key=lambda s: (-row[s], s))[:topk])
        rows.append(chosen + [-1] * (width - len(chosen)))
    return rows


def attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    layout: PackedLayout,
    window: int,
    turn: tuple[Tensor, Tensor],
    entries: Tensor | None = None,
    seen: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out [T, H, c] rotated back, lse [T, H], each token's head-summed probability of each entry it sees)."""
    total, heads, width = q.shape
    allowed = torch.zeros(total, total + (0 if entries is None else len(entries)), dtype=torch.bool)
    t = 0
    for length in layout.document_lengths:
        start = t
        for t in range(start, start + length):
            allowed[t, max(start, t - window + 1) : t + 1] = True
            if seen is not None:
                allowed[t, [total + e for e in seen[t]]] = True
        t = start + length
    keys = kv if entries is None else torch.cat((kv, entries))
    logits = (q.reshape(-1, width) @ keys.T).view(total, heads, -1) / math.sqrt(width)
    logits = torch.where(allowed[:, None], logits, -math.inf)
    logits = torch.cat((logits, sink.view(1, -1, 1).expand(total, -1, 1)), 2)
    p = torch.softmax(logits, 2)
    summed = p.detach().sum(1)
    masses = [] if seen is None else [summed[t, [total + e for e in places]] for t, places in enumerate(seen)]
    cos, sin = (x.double() for x in turn)
    return rotary(p[..., :-1] @ keys, cos, -sin), torch.logsumexp(logits, 2), masses


def kl_sum(mass: list[Tensor], scores: Tensor, places: list[list[int]], num_tokens: int) -> Tensor:
    """Sum over tokens of KL(mass / sum(mass) || softmax(scores over places))."""
    total, rows = scores.new_zeros(()), scores.unbind(0)
    for t in range(num_tokens):
        if places[t] and float(mass[t].sum()) > 0:
            target = mass[t] / mass[t].sum()
            predicted = torch.log_softmax(rows[t][places[t]], 0)
            total = total + (torch.special.xlogy(target, target) - target * predicted).sum()
    return total


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for place, e in enumerate(chosen[t].tolist()):
            row = row + weights[t, place] * (down[e] @ swiglu(gate_up[e] @ x[t], limit))
        rows.append(row)
    return torch.stack(rows)


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.T
    picked = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, 1)
    return -(weights * picked).sum(), picked.detach()
