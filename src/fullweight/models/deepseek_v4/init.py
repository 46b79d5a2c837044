"""Fresh weights.

Matrices are N(0, initializer_range^2), norms one, sinks, biases and position biases zero. Hyper-connection
gates start at 0.01 (arXiv 2512.24880, table 5), not at transformers' 1. Hash tables are not published as a
rule; any table with K distinct experts per token, each expert equally often and different per layer fits the
report. Here token t of layer l takes K neighbours on a ring of shuffled experts, starting at a shuffled place.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fullweight.models.deepseek_v4.model import DeepSeekV4

HYPER_CONNECTION_SCALE = 0.01


@torch.no_grad()
def initialise(model: DeepSeekV4, seed: int = 0) -> DeepSeekV4:
    """Fill every parameter and buffer in place; each tensor's values depend on the seed and its name alone."""
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "enorm.weight", "hnorm.weight")):
            parameter.fill_(1.0)
        elif name.endswith("_scale"):
            parameter.fill_(HYPER_CONNECTION_SCALE)
        elif name.endswith(("_base", "attn_sink", "ape")):
            parameter.zero_()
        else:
            parameter.normal_(0.0, config.initializer_range, generator=_generator(seed, name))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(hash_table(config.vocab_size, config.n_routed_experts, buffer.shape[1], seed, name))
        else:
            buffer.zero_()
    return model


def hash_table(vocab_size: int, num_experts: int, top_k: int, seed: int, name: str) -> Tensor:
    """[V, K] int64: K distinct experts per token, loads over the vocabulary equal within one token."""
    generator = _generator(seed, name)
    ring = torch.randperm(num_experts, generator=generator)
    start = torch.randperm(vocab_size, generator=generator) % num_experts
    return ring[(start.unsqueeze(1) + torch.arange(top_k)) % num_experts]


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
