"""Which optimizer each parameter gets, and which independent matrices it is made of.

The report (section 3.3) gives AdamW to the embedding, the head, all norms and the hyper-connections' static
biases and gating factors, and Muon to "all other modules". Two choices where its text leaves room: attention
sinks, being vectors, take AdamW; hyper-connection matrices are the three maps they stack (pre, post, comb), all
Muon. Independent matrices are each expert's gate, up and down, each group of the output projection, each
series of a CSA compressor.
"""

from __future__ import annotations

import re

from fullweight.core.role import ParameterRole
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config

_ADAMW = re.compile(r"(^|\.)(embed|head)\.weight$|norm\.weight$|(^|\.)[eh]norm\.weight$|_(base|scale)$|attn_sink$")


def parameter_role(name: str, config: DeepSeekV4Config) -> ParameterRole:
    """Role of a parameter by its published name (experts stacked)."""
    if _ADAMW.search(name):
        return ParameterRole("adamw", weight_decay=bool(re.search(r"(^|\.)(embed|head)\.weight$", name)))
    return ParameterRole("muon", _num_matrices(name, config))


def _num_matrices(name: str, config: DeepSeekV4Config) -> int:
    if name.endswith("ffn.experts.gate_up"):
        return 2 * config.n_routed_experts
    if name.endswith("ffn.experts.down"):
        return config.n_routed_experts
    if name.endswith("shared_experts.gate_up"):
        return 2
    if name.endswith("wo_a.weight"):
        return config.o_groups
    if name.endswith(("wkv.weight", "wgate.weight")) and "compressor" in name:
        layer = int(name.split(".")[1])
        return 2 if config.compress_ratios[layer] == CSA_RATIO else 1
    return 1
