"""Manifold-constrained hyper-connections (mHC): n residual streams mixed by a doubly stochastic matrix.

Source: report section 2.2, arXiv 2512.24880. All of it is fp32; the streams themselves are in the compute
dtype. Parameter names are the published ones (`hc_attn_fn`, `hc_attn_base`, ...), so these classes hold no
module of their own but register the three tensors on the block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.ops.recompute import offer
from fullweight.ops.reference import HyperOutput, ReferenceOperations


def register_hyper_connection(module: nn.Module, prefix: str, config: DeepSeekV4Config) -> None:
    """Add `{prefix}_fn` [(2+n)n, n*d], `{prefix}_base` [(2+n)n] and `{prefix}_scale` [3] to a module."""
    n, d = config.hc_mult, config.hidden_size
    module.register_parameter(f"{prefix}_fn", nn.Parameter(torch.empty((2 + n) * n, n * d)))
    module.register_parameter(f"{prefix}_base", nn.Parameter(torch.empty((2 + n) * n)))
    module.register_parameter(f"{prefix}_scale", nn.Parameter(torch.empty(3)))


def register_hyper_head(module: nn.Module, config: DeepSeekV4Config) -> None:
    """Add `hc_head_fn` [n, n*d], `hc_head_base` [n] and `hc_head_scale` [1] to a module."""
    n, d = config.hc_mult, config.hidden_size
    module.register_parameter("hc_head_fn", nn.Parameter(torch.empty(n, n * d)))
    module.register_parameter("hc_head_base", nn.Parameter(torch.empty(n)))
    module.register_parameter("hc_head_scale", nn.Parameter(torch.empty(1)))


def hyper_pre(
    module: nn.Module, prefix: str, config: DeepSeekV4Config, ops: ReferenceOperations, streams: Tensor
) -> HyperOutput:
    """Streams [T, n, d] to a sublayer's input and the weights that fold its output back."""
    fn, base, scale = (module.get_parameter(f"{prefix}_{name}") for name in ("fn", "base", "scale"))
    out = ops.hyper_pre(streams, fn, base, scale, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
    offer(out.input, ops.hyper_mix, streams, out.pre)
    return out


def hyper_head(module: nn.Module, config: DeepSeekV4Config, ops: ReferenceOperations, streams: Tensor) -> Tensor:
    """Streams [T, n, d] to one [T, d]."""
    fn, base, scale = (module.get_parameter(f"hc_head_{name}") for name in ("fn", "base", "scale"))
    return ops.hyper_head(streams, fn, base, scale, config.hc_eps, config.rms_norm_eps)
