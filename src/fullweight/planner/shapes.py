"""What the planner needs to know of a model: work, parameters and traffic by component, one record for all
families.

A cost is asked of models that this project does not train too, so that it can be judged on what others published.
`Shape` describes a decoder of the usual kinds (GPT, Llama, Mixtral, Qwen3-MoE, DeepSeek-V3: attention with grouped
or latent keys, dense or routed feed-forward layers); `work_of` turns it, and `work_of_v4` turns DeepSeek-V4's
exact count (`models/deepseek_v4/flops.py`), into the same `Work`.

Work is counted for one token, forward, in FLOPs at 2 a multiply-add, of one document as long as the row or, of
DeepSeek-V4, of documents of any lengths; attention meets each key it may see, so a causal document counts half of
all pairs. Left out: norms, softmax, activations,
which are in `layer_bytes` as traffic. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, NonNegativeInt, PositiveInt

from fullweight.core.config import Config
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.flops import forward_flops, layer_flops, parameters_by_component


class Shape(Config):
    """A decoder's sizes; a file `[shape]` with these keys describes a model of one's own."""

    name: str
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: NonNegativeInt = Field(description="width of dense feed-forward layers; 0 when all are routed")
    vocab: PositiveInt
    gated: bool = Field(True, description="feed-forward with a gate: three matrices, else two")
    experts: NonNegativeInt = 0
    top_k: NonNegativeInt = 0
    expert_ffn: NonNegativeInt = 0
    shared_experts: NonNegativeInt = 0
    dense_layers: NonNegativeInt = Field(0, description="first layers without experts")
    q_rank: NonNegativeInt = Field(0, description="latent queries (MLA); 0: full")
    kv_rank: NonNegativeInt = Field(0, description="latent keys and values (MLA); 0: grouped")
    rope_dim: NonNegativeInt = Field(0, description="rotated part of an MLA key, beside head_dim")
    mtp_layers: NonNegativeInt = 0
    window: NonNegativeInt = Field(0, description="keys that every second layer sees; 0: all")


@dataclass(frozen=True)
class Work:
    """One token, forward, whole model; parameters whole. FLOPs, numbers, bytes as the names say."""

    name: str
    layers: int
    hidden: int
    gemm_flops: float  # projections, dense feed-forward, shared experts, router, head
    expert_flops: float
    attention_flops: float
    attention_made: float  # the same, as kernels make it: what is masked out of a selection, too narrow heads
    dense_parameters: int  # all but routed experts, embedding included
    expert_parameters: int
    experts: int
    top_k: int
    moe_layers: int
    layer_bytes: float  # traffic of memory-bound operations, one token, one layer, forward
    head_bytes: float  # traffic of the logits and the loss, one token, forward and backward
    input_bytes: float  # traffic of making the inputs of a layer's products narrower, one token, forward
    score_bytes: (
        float  # traffic of one layer's attention scores, one token, forward, where they are not fused away
    )
    expert_width: int  # of one expert's products
    stage_costs: tuple[float, ...]  # forward FLOPs of each layer; the last one with all that follows it

    @property
    def training_flops(self) -> float:
        """Model FLOPs of one token's forward and backward pass."""
        return 3 * (self.gemm_flops + self.expert_flops + self.attention_flops)


def work_of(shape: Shape, sequence: int) -> Work:
    """The work of one document of `sequence` tokens, a token's share of it."""
    d, pairs = shape.hidden, (sequence + 1) / 2
    attention, width = _attention_parameters(shape)
    seen = [
        pairs if not (shape.window and i % 2) else _windowed(sequence, shape.window) for i in range(shape.layers)
    ]
    matrices = 3 if shape.gated else 2
    dense_ffn = matrices * d * shape.ffn
    shared = 3 * d * shape.expert_ffn * shape.shared_experts + d * shape.experts
    expert = 3 * d * shape.expert_ffn
    moe_layers = shape.layers - shape.dense_layers if shape.experts else 0
    head = d * shape.vocab
    extra_layers = shape.mtp_layers
    total_layers = shape.layers + extra_layers
    moe_total = moe_layers + (extra_layers if shape.experts else 0)
    dense_total = total_layers - moe_total
    mtp = extra_layers * (2 * d * d + head)
    gemm = total_layers * attention + dense_total * dense_ffn + moe_total * shared + head
    attention_flops = sum(2 * width * s for s in seen) + extra_layers * 2 * width * pairs
    costs = [
        2 * (attention + (dense_ffn if i < shape.layers - moe_layers else shared + shape.top_k * expert))
        + 2 * width * seen[i]
        for i in range(shape.layers)
    ]
    last = 2 * (mtp + head) + extra_layers * (
        2 * attention + 2 * (shared + shape.top_k * expert) + 2 * width * pairs
    )
    ffn_traffic = shape.ffn if not moe_layers else shape.top_k * (shape.expert_ffn + d) + shape.expert_ffn
    return Work(
        name=shape.name,
        layers=total_layers,
        hidden=d,
        gemm_flops=2 * (gemm + mtp),
        expert_flops=2 * moe_total * shape.top_k * expert,
        attention_flops=attention_flops,
        attention_made=attention_flops * max(1.0, _WIDE_HEAD / shape.head_dim),
        dense_parameters=int(gemm + extra_layers * 2 * d * d + head),
        expert_parameters=moe_total * shape.experts * expert,
        experts=shape.experts,
        top_k=shape.top_k,
        moe_layers=moe_total,
        layer_bytes=2.0 * (14 * d + 4 * shape.heads * shape.head_dim + (3 if shape.gated else 2) * ffn_traffic),
        head_bytes=16.0 * shape.vocab * (1 + extra_layers),
        # read as two bytes, written as one in each of two orders
        input_bytes=4.0
        * (
            2 * d
            + shape.heads * shape.head_dim
            + ((shape.top_k * (d + shape.expert_ffn)) if moe_layers else d + shape.ffn)
        ),
        # written as scores, read and written by scale with mask, by softmax and by dropout, and read again
        score_bytes=2.0 * 5 * shape.heads * sequence,
        expert_width=shape.expert_ffn,
        stage_costs=(*costs[:-1], costs[-1] + last),
    )


def work_of_v4(config: DeepSeekV4Config, lengths: Sequence[int]) -> Work:
    """DeepSeek-V4's exact work of documents of these lengths, a token's share of it."""
    flops, tokens = forward_flops(config, lengths).as_dict(), sum(lengths)
    parameters = parameters_by_component(config)
    blocks = config.num_hidden_layers + (1 if config.num_nextn_predict_layers else 0)
    routed = parameters["routed_experts"] // config.num_hidden_layers * blocks
    d, c, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    # sparse attention has as many slots for every query as the longest selection of its document
    slots = sum(n * min(config.index_topk, n // CSA_RATIO) for n in lengths) * config.count_layers(LayerKind.CSA)
    empty = 4 * heads * c * slots - flops["csa_attention"]
    expert = flops["routed_experts"] / config.num_hidden_layers * blocks
    attention = sum(flops[k] for k in ("window_attention", "csa_attention", "hca_attention", "indexer_scores"))
    total = sum(flops.values())
    layers, rest = layer_flops(config, lengths)
    # a query's selected entries are gathered for itself alone, and read again backward, where their gradients are
    # added up in fp32: 2 bytes forward and 10 backward, as if 4 were read in each of three passes
    gathered = 2 * flops["csa_attention"] / (4 * heads) / tokens / config.num_hidden_layers
    f, k, n = config.moe_intermediate_size, config.num_experts_per_tok, config.hc_mult
    return Work(
        name="deepseek-v4",
        layers=blocks,
        hidden=d,
        gemm_flops=(total - expert - attention) / tokens,
        expert_flops=expert / tokens,
        attention_flops=attention / tokens,
        attention_made=(attention + empty) / tokens,
        dense_parameters=sum(parameters.values()) - routed,
        expert_parameters=routed,
        experts=config.n_routed_experts,
        top_k=k,
        moe_layers=blocks,
        layer_bytes=2.0 * (14 * d + _STREAMS * n * d + 4 * heads * c + gathered + 3 * (k * (f + d) + f)),
        head_bytes=16.0 * config.vocab_size * (1 + blocks - config.num_hidden_layers),
        input_bytes=4.0 * (2 * d + heads * c + k * (d + f)),
        score_bytes=2.0 * 5 * heads * (config.sliding_window + config.index_topk),
        expert_width=f,
        stage_costs=(*(x / tokens for x in layers[:-1]), (layers[-1] + rest) / tokens),
    )


_WIDE_HEAD = 128
"""Width of a head below which the exponentials of attention, not its products, set the pace."""
_STREAMS = 2 * (4 + 13) / 3
"""How often a block's hyper-connections read or write the streams, a third of both passes.

Each of the two, forward: read for the norm and weights, for the input, and to mix them, and written. Backward:
their gradient and themselves read and a gradient written (3), the input's likewise (2), norm's and weights' (2),
and three gradients added up, two reads and a write for each of two sums (6).
"""


def _attention_parameters(shape: Shape) -> tuple[int, int]:
    """Parameters of one layer's projections, and the width that a query-key pair costs, both products together."""
    d, heads, c = shape.hidden, shape.heads, shape.head_dim
    if not shape.kv_rank:
        return d * c * (2 * heads + 2 * shape.kv_heads), 2 * heads * c
    query = shape.q_rank * (d + heads * (c + shape.rope_dim)) if shape.q_rank else d * heads * (c + shape.rope_dim)
    keys = d * (shape.kv_rank + shape.rope_dim) + shape.kv_rank * heads * 2 * c
    return query + keys + heads * c * d, heads * (2 * c + shape.rope_dim)


def _windowed(sequence: int, window: int) -> float:
    """Keys that a token sees on average, at most `window`."""
    w = min(window, sequence)
    return w - w * (w - 1) / (2 * sequence)
