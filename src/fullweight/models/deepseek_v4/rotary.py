"""Rotary tables: plain RoPE for sliding layers, YaRN-interpolated RoPE for compressed ones.

Angles, cosines and sines are fp32 whatever the model computes in. No magnitude factor is applied to them nor
to the softmax scale. Source: facts of the released config and reference code (rope_theta 10000,
compress_rope_theta 160000, YaRN factor 16); YaRN is arXiv 2309.00071.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, yarn_correction_range


@dataclass(frozen=True)
class Rotation:
    """cos and sin [T, qk_rope_head_dim / 2], fp32."""

    cos: Tensor
    sin: Tensor


def frequencies(config: DeepSeekV4Config, compressed: bool, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each rotary pair, fp32 [qk_rope_head_dim / 2]; YaRN when `compressed`."""
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    # float64 on the host, so that every device starts from the same rounding
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = theta**-exponents
    if not compressed:
        return plain.to(device, torch.float32)
    low, high = yarn_correction_range(config)
    pair = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (plain * ((1 - ramp) + ramp / config.rope_scaling.factor)).to(device, torch.float32)


def rotation(positions: Tensor, frequency: Tensor) -> Rotation:
    """Table for integer positions [T] and frequencies [R]."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequency
    return Rotation(angles.cos(), angles.sin())
