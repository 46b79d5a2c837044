"""What torch_npu's operators do, from their documentation alone, for tensors on the CPU.

`install()` registers these functions as the CPU's kernels of `torch.ops.npu.*`, so that the Ascend operations
can be run for values. They are written from the pages named beside them, not from our code: plain loops and
formulas in float64. Results have the documented types; for float64 input, statistics are float64 too, so that
comparisons are tight. Pages: `torch_npu/_op_plugin_docs.py` of the wheel ("op"), and CANN's ops-transformer
documents ("aclnn").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KERNELS: dict[str, Callable[..., Any]] = {}


@functools.cache
def install() -> torch.library.Library:
    library = torch.library.Library("npu", "IMPL")
    for name, kernel in _KERNELS.items():
        library.impl(name, kernel, "CPU")
    return library


def operator(kernel: Callable[..., Any]) -> Callable[..., Any]:
    _KERNELS[kernel.__name__] = kernel
    return kernel


def _statistics(x: Tensor) -> torch.dtype:
    """Statistics are fp32 whatever the input's narrow type."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- op: npu_rms_norm: y = x / Rms(x) * g, Rms(x) = sqrt(mean(x^2) + eps); second output 1 / Rms(x) ------


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    rms = (x.square().sum(-1, keepdim=True) / x.shape[-1] + epsilon).sqrt()
    return x / rms * gamma, 1 / rms


@operator
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert gamma.dtype == x.dtype, "the page wants both of one type"
    out, inverse = _rms_norm(x.double(), gamma.double(), epsilon)
    return out.to(x.dtype), inverse.to(_statistics(x))


@operator
def npu_rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    # aclnnRmsNormGrad: dx = (dy g - x rstd mean(dy g x rstd)) rstd, dgamma = sum(dy x rstd), fp32
    wide, inverse, grad = x.double(), rstd.double(), dy.double()
    scaled, normed = grad * gamma.double(), wide * inverse
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
    return dx.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(_statistics(x))


# ---- op: npu_rotary_mul, interleave: x1 = x[..., ::2], x2 = x[..., 1::2], r1 x + r2 interleave(-x2, x1) ----


@operator
def npu_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    assert rotate is None
    assert x.dim() == r1.dim() == r2.dim() == 4
    assert r1.shape == r2.shape == (1, x.shape[1], 1, x.shape[3]), "interleave, BSND: the table is 1S1D"
    assert x.dtype == r1.dtype == r2.dtype
    other = torch.empty_like(x)
    if rotary_mode == "interleave":
        for pair in range(0, x.shape[-1], 2):
            other[..., pair], other[..., pair + 1] = -x[..., pair + 1], x[..., pair]
    else:
        half = x.shape[-1] // 2
        other[..., :half], other[..., half:] = -x[..., half:], x[..., :half]
    return r1 * x + r2 * other


# ---- op: npu_clipped_swiglu: y = A sigmoid(alpha A) (B + bias), A and B clamped, halves or odd and even -----


@operator
def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    assert group_index is None
    assert dim == -1
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = a.double().clamp(max=limit), b.double().clamp(min=-limit, max=limit)
    return (a / (1 + (-alpha * a).exp()) * (b + bias)).to(x.dtype)


@operator
def npu_swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    # op npu_swiglu: A * sigmoid(A) * B, A and B the halves along dim
    assert dim == -1
    a, b = x.double().chunk(2, -1)
    gate = 1 / (1 + (-a).exp())
    da = grad.double() * b * (gate + a * gate * (1 - gate))
    return torch.cat((da, grad.double() * a * gate), -1).to(x.dtype)


# ---- op: npu_moe_token_permute: permuted[sorted_indices[i]] = tokens[i // topK], sorted by expert --------


@operator
def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    assert not num_out_tokens
    assert not padded_mode
    flat, top_k = indices.flatten().tolist(), indices.shape[1]
    order = sorted(range(len(flat)), key=lambda i: flat[i])
    place = torch.empty(len(flat), dtype=torch.int32)
    permuted = tokens.new_empty(len(flat), tokens.shape[1])
    for position, i in enumerate(order):
        place[i] = position
        permuted[position] = tokens[i // top_k]
    return permuted, place


@operator
def npu_moe_token_unpermute(
    permuted: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    # the rows at a token's indices, each times its probability, added up
    assert sorted_indices.dtype == torch.int32
    assert not padded_mode
    assert restore_shape is None
    top_k = 1 if probs is None else probs.shape[1]
    rows = permuted[sorted_indices.long()].double()
    if probs is not None:
        rows = rows * probs.double().flatten().unsqueeze(1)
    return torch.stack([part.sum(0) for part in rows.split(top_k)]).to(permuted.dtype)


# ---- op: npu_grouped_matmul: y_i = x_i @ weight_i, groups along x's rows; list type 0 is cumulative -------


@operator
def npu_grouped_matmul(x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
    assert options.pop("split_item") in (2, 3)
    assert options.pop("group_type") == 0
    ends = _ends(options.pop("group_list"), options.pop("group_list_type", 0))
    assert all(value is None or not value for value in options.values()), options
    assert x[0].dtype == weight[0].dtype
    rows, matrices = x[0].double(), weight[0].double()
    out = rows.new_full((rows.shape[0], matrices.shape[2]), float("nan"))
    for group, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
        out[a:b] = rows[a:b] @ matrices[group]
    return [out.to(x[0].dtype)]


@operator
def npu_grouped_matmul_add_(
    accumulated: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> Tensor:
    # op npu_grouped_matmul_add: y_i += x_i^T @ weight_i over the group's rows
    assert transpose_x
    assert not transpose_weight
    assert group_type == 2
    ends = _ends(group_list, group_list_type)
    for group, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
        accumulated[group] += (x[a:b].double().T @ weight[a:b].double()).to(accumulated.dtype)
    return accumulated


def _ends(group_list: Tensor, kind: int | None) -> list[int]:
    assert group_list.dtype == torch.int64
    assert kind == 1 or bool((group_list.diff() >= 0).all())
    return (group_list if kind == 0 else group_list.cumsum(0)).tolist()


# ---- op and aclnn: npu_lightning_indexer: top k of sum_h w_h ReLU(q_h K^T), causal from the lower right ------


@operator
def npu_lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    assert options["layout_query"] == options["layout_key"] == "TND"
    assert query.dtype == key.dtype == weights.dtype
    assert (key.shape[1:], weights.shape) == ((1, query.shape[2]), query.shape[:2])
    assert all(t.is_contiguous() for t in (query, key, weights))
    ends = [options[f"actual_seq_lengths_{name}"] for name in ("query", "key")]
    assert all(end.dtype == torch.int32 for end in ends)
    queries_to, keys_to = (end.tolist() for end in ends)
    assert (queries_to[-1], keys_to[-1]) == (query.shape[0], key.shape[0]), "all rows are of a run"
    count, mask = options.get("sparse_count", 2048), options.get("sparse_mode", 3)
    found = torch.full((query.shape[0], 1, count), -1, dtype=torch.int32)
    first_query = first_key = 0
    for query_end, key_end in zip(queries_to, keys_to, strict=True):
        q, k = query[first_query:query_end].double(), key[first_key:key_end, 0].double()
        for j in range(q.shape[0]):
            seen = k.shape[0] if mask == 0 else k.shape[0] - q.shape[0] + j + 1
            weight = weights[first_query + j].double()
            score = [float((weight * (q[j] @ k[s]).clamp(min=0)).sum()) for s in range(seen)]
            best = sorted(range(seen), key=lambda s, score=score: (-score[s], s))[:count]
            found[first_query + j, 0, : len(best)] = torch.tensor(best, dtype=torch.int32)
        first_query, first_key = query_end, key_end
    return found, query.new_empty(0)


# ---- op and aclnn: npu_sparse_flash_attention: softmax(scale Q K^T) V over the listed rows ---------------


def _listed(sparse_indices: Tensor, token: int) -> list[int]:
    listed = sparse_indices[token, 0].tolist()
    valid = [row for row in listed if row >= 0]
    assert listed[: len(valid)] == valid, "valid places come first"
    assert len(set(valid)) == len(valid)
    return valid


@operator
def npu_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_attention(query, key, value, sparse_indices, options)
    assert options["layout_query"] == options["layout_kv"] == "TND"
    assert options["return_softmax_lse"]
    q = torch.cat((query, options["query_rope"]), -1).double()
    k = torch.cat((key, options["key_rope"]), -1).squeeze(1).double()
    out = query.new_zeros(query.shape, dtype=torch.float64)
    largest, total = (query.new_zeros(1, *query.shape[:2], dtype=torch.float64) for _ in range(2))
    for token in range(query.shape[0]):
        rows = _listed(sparse_indices, token)
        scores = scale_value * q[token] @ k[rows].T
        largest[0, token] = scores.amax(-1)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total[0, token] = weights.sum(-1)
        out[token] = weights / weights.sum(-1, keepdim=True) @ value[rows, 0].double()
    return out.to(query.dtype), largest.to(_statistics(query)), total.to(_statistics(query))


@operator
def npu_sparse_flash_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    d_out: Tensor,
    out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    scale_value: float,
    sparse_block_size: int,
    query_rope: Tensor,
    key_rope: Tensor,
    actual_seq_qlen: Tensor,
    actual_seq_kvlen: Tensor,
    layout: str | None = "BSND",
    sparse_mode: int | None = 3,
    pre_tokens: int | None = 2**63 - 1,
    next_tokens: int | None = 2**63 - 1,
    attention_mode: int | None = 0,
) -> tuple[Tensor, ...]:
    # aclnnSparseFlashAttentionGrad: dP = dO V^T, dV = P^T dO, dS = P (dP - sum(dO O)), dQ = dS K, dK = dS^T Q
    options = {"query_rope": query_rope, "key_rope": key_rope, "sparse_block_size": sparse_block_size}
    options |= {"actual_seq_qlen": actual_seq_qlen, "actual_seq_kvlen": actual_seq_kvlen}
    options |= {"sparse_mode": sparse_mode, "attention_mode": attention_mode}
    _check_attention(query, key, value, sparse_indices, options)
    assert layout == "TND"
    assert sparse_indices.shape[-1] % 1024 == 0
    q = torch.cat((query, options["query_rope"]), -1).double()
    k = torch.cat((key, options["key_rope"]), -1).squeeze(1).double()
    v, grad = value.squeeze(1).double(), d_out.double()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for token in range(query.shape[0]):
        rows = _listed(sparse_indices, token)
        scores = scale_value * q[token] @ k[rows].T
        p = (scores - softmax_max[0, token].double().unsqueeze(-1)).exp()
        p = p / softmax_sum[0, token].double().unsqueeze(-1)
        dp = grad[token] @ v[rows].T
        ds = p * (dp - (grad[token] * out[token].double()).sum(-1, keepdim=True)) * scale_value
        dq[token] = ds @ k[rows]
        dk[rows] += ds.T @ q[token]
        dv[rows] += p.T @ grad[token]
    width = query.shape[-1]
    parts = (dq[..., :width], dk[:, None, :width], dv[:, None], dq[..., width:], dk[:, None, width:])
    return tuple(part.to(query.dtype) for part in parts)


def _check_attention(q: Tensor, key: Tensor, value: Tensor, indices: Tensor, options: dict[str, Any]) -> None:
    assert key.shape == value.shape == (key.shape[0], 1, q.shape[-1])
    assert options["query_rope"].shape == (*q.shape[:2], 64)
    assert options["key_rope"].shape == (key.shape[0], 1, 64)
    assert (indices.dtype, indices.shape[:2]) == (torch.int32, (q.shape[0], 1))
    assert options["attention_mode"] == 2
    assert options["sparse_mode"] == 0
    assert options.get("sparse_block_size", 1) == 1
    assert options.get("sinks") is None
    lengths = [options[k] for k in options if k.startswith("actual_seq")]
    assert [int(length) for length in lengths] == [q.shape[0], key.shape[0]]
    assert all(length.dtype == torch.int32 for length in lengths)
    assert all(t.is_contiguous() for t in (q, key, indices, options["query_rope"], options["key_rope"]))


# ---- op: npu_cross_entropy_loss, reduction none: log_softmax and nll_loss; also gives the log-probabilities ----


@operator
def npu_cross_entropy_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", **options: Any
) -> tuple[Tensor, ...]:
    assert reduction == "none"
    assert weight is None
    assert not options
    wide = x.double()
    log_prob = wide - wide.exp().sum(-1, keepdim=True).log()
    loss = -log_prob[torch.arange(len(target)), target]
    return loss.to(x.dtype), log_prob.to(x.dtype), x.new_empty(0), x.new_empty(0)


@operator
def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    assert reduction == "none"
    assert weight is grad_zloss is lse_for_zloss is None
    assert not options
    probability = log_prob.double().exp()
    probability[torch.arange(len(target)), target] -= 1
    return (probability * grad_loss.double().unsqueeze(1)).to(log_prob.dtype)


# ---- aclnnMhcPre, aclnnMhcPost, aclnnMhcPostBackward; MhcPreBackward's page defers to the forward's formulas ----


def _mhc_pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, norm_eps: float, hc_eps: float) -> Any:
    n = x.shape[1]
    flat = x.reshape(x.shape[0], -1)
    inverse = (flat.square().mean(-1) + norm_eps) ** -0.5
    products = flat @ phi.T
    w = products * inverse.unsqueeze(1)
    pre = torch.sigmoid(w[:, :n] * alpha[0] + bias[:n]) + hc_eps
    post = 2 * torch.sigmoid(w[:, n : 2 * n] * alpha[1] + bias[n : 2 * n])
    res = (w[:, 2 * n :] * alpha[2] + bias[2 * n :]).view(-1, n, n)
    mixed = sum(pre[:, i : i + 1] * x[:, i] for i in range(n))
    return mixed, post, res, inverse, products, pre


@operator
def npu_mhc_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    gamma: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    out_flag: int = 0,
    inner_precise: int = 0,
) -> Any:
    assert gamma is None
    assert out_flag == 1
    assert inner_precise == 0
    outputs = _mhc_pre(*(t.double() for t in (x, phi, alpha, bias)), norm_eps, hc_eps)
    return (outputs[0].to(x.dtype), *(t.to(_statistics(x)) for t in outputs[1:]))


@operator
def npu_mhc_pre_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    grad_h_in: Tensor,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    inv_rms: Tensor,
    h_mix: Tensor,
    h_pre: Tensor,
    h_post: Tensor,
    gamma: Tensor | None = None,
    hc_eps: float = 1e-6,
    grad_x_post: Tensor | None = None,
    inner_precise: int = 0,
) -> tuple[Tensor, ...]:
    # through the kept values: h_mix = flat phi^T, w = h_mix inv_rms, h_pre - hc_eps and h_post / 2 are sigmoids
    assert gamma is None
    assert grad_x_post is None
    n = x.shape[1]
    wide, inverse, mix = x.double(), inv_rms.double().unsqueeze(1), h_mix.double()
    flat, scales = wide.flatten(1), alpha.double()
    gate, half = h_pre.double() - hc_eps, h_post.double() / 2
    dpre = (grad_h_in.double().unsqueeze(1) * wide).sum(-1) * gate * (1 - gate)
    dpost = grad_h_post.double() * 2 * half * (1 - half)
    dz = torch.cat((dpre, dpost, grad_h_res.double().flatten(1)), 1)
    per_output = torch.cat((scales[:1].expand(n), scales[1:2].expand(n), scales[2:].expand(n * n)))
    dw, w = dz * per_output, mix * inverse
    dalpha = torch.stack([part.sum() for part in (dz * w).split((n, n, n * n), 1)])
    dmix = dw * inverse
    dinverse = (dw * mix).sum(1, keepdim=True)
    dflat = dmix @ phi.double() - dinverse * inverse**3 * flat / flat.shape[1]
    dx = dflat.view_as(wide) + h_pre.double().unsqueeze(-1) * grad_h_in.double().unsqueeze(1)
    wide_type = _statistics(x)
    results = (dmix.T @ flat, dalpha, dz.sum(0), torch.zeros_like(phi))
    return (dx.to(x.dtype), *(t.to(wide_type) for t in results))


@operator
def npu_mhc_post(x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Tensor:
    # x' = H_res^T x + h_out (outer) H_post
    rows = [
        r.double().T @ s.double() + p.double()[:, None] * o.double()
        for s, r, o, p in zip(x, h_res, h_out, h_post, strict=True)
    ]
    return torch.stack(rows).to(x.dtype)


@operator
def npu_mhc_post_backward(
    grad_y: Tensor, x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor
) -> tuple[Tensor, ...]:
    grad, wide = grad_y.double(), x.double()
    dx = torch.stack([r.double() @ g for r, g in zip(h_res, grad, strict=True)])
    dres = torch.stack([s @ g.T for s, g in zip(wide, grad, strict=True)])
    dout = (grad * h_post.double().unsqueeze(-1)).sum(-2)
    dpost = (grad * h_out.double().unsqueeze(-2)).sum(-1)
    return dx.to(x.dtype), dres.to(h_res.dtype), dout.to(h_out.dtype), dpost.to(h_post.dtype)


# ---- op: npu_mhc_sinkhorn: softmax over rows, then columns and rows in turn; aclnnMhcSinkhornBackward ----------
# Kept for backward are all rounds' matrices and sums as one row each ("1D"); in which order is the operator's own.


@operator
def npu_mhc_sinkhorn(
    x: Tensor, *, eps: float = 1e-6, num_iters: int = 20, out_flag: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    exponents = (x.double() - x.double().amax(-1, keepdim=True)).exp()
    norms, sums = [exponents / exponents.sum(-1, keepdim=True) + eps], [torch.zeros_like(x.double())]
    for k in range(1, 2 * num_iters):
        total = norms[-1].sum(-2 if k % 2 else -1, keepdim=True) + eps
        sums.append(total.expand_as(norms[-1]))
        norms.append(norms[-1] / total)
    y = norms[-1].to(x.dtype)
    if not out_flag:
        return y, None, None
    wide = _statistics(x)
    return y, torch.stack(norms).flatten().to(wide), torch.stack(sums).flatten().to(wide)


@operator
def npu_mhc_sinkhorn_backward(grad_y: Tensor, norm: Tensor, sum_: Tensor) -> Tensor:
    norms, sums = (t.double().view(-1, *grad_y.shape) for t in (norm, sum_))
    grad = grad_y.double()
    for k in range(len(norms) - 1, 0, -1):
        grad = (grad - (grad * norms[k]).sum(-2 if k % 2 else -1, keepdim=True)) / sums[k]
    # the page takes norm_0, softmax plus eps, for the softmax
    return ((grad - (grad * norms[0]).sum(-1, keepdim=True)) * norms[0]).to(grad_y.dtype)
