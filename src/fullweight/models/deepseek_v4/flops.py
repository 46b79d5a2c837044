"""What a DeepSeek-V4 costs: FLOPs and parameters by component, in exact integers.

Cost depends on where documents end (attention and compression never cross a boundary), so every function
takes the lengths of the documents and sums each in closed form: a million-token document costs the same to
count as a short one.

Counted: matrix products, at 2 FLOPs a multiply-add, and the hyper-connections' mixing of the n streams
(2nd + 2n^2 d + 2nd a sublayer). Attention is counted sparsely: token t of a document (from 0) meets
min(t+1, window) keys, in CSA min(floor((t+1)/4), top-k) entries, in HCA floor((t+1)/128); the indexer scores
all floor((t+1)/4). Every token counts in every projection and in the heads, also where a compression window
stays incomplete or a document's last token has nothing to predict.

Not counted: recomputation, padding (pass real documents only), softmax, norms, RoPE, activations, Sinkhorn,
the gated sum inside a compressor, the indexer's sum over heads, embedding lookups, the optimizer. So FLOP/s
from here is model arithmetic done, and FLOP/s over the peak is model FLOPs utilisation.

Training is forward plus twice forward (gradients of inputs and of weights), except for the indexer, whose
input is detached, so that its projections have no input gradient:

- `indexer_loss="none"`: forward only;
- `"selected"`: projections x2; the scores' backward (twice their forward) over the selected entries; the
  target is read off the attention already computed;
- `"visible"`: the backward over all visible entries; the target also needs query-key products with the
  entries that attention did not select (component `indexer_loss`).

With `dense_csa` attention reads every visible entry, and the indexer runs only if it has a loss.
MTP counts its block, both input projections (the one of the hidden state once per stream), its collapse of
the streams and its pass through the shared head.

Left out: quantisation arithmetic and communication. Imports no torch. Source: facts of the released model,
sections 4.1 and 4.2 (whose MTP figure takes the hidden-state projection once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from fullweight.core.errors import DataError, FullweightError
from fullweight.models.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config, LayerKind

IndexerLoss = Literal["none", "selected", "visible"]


@dataclass(frozen=True)
class FlopsBreakdown:
    """FLOPs by component, summed over the main layers; `mtp` is everything the MTP layer adds."""

    attention_projections: int = 0
    window_attention: int = 0
    csa_attention: int = 0
    hca_attention: int = 0
    compressors: int = 0
    indexer_projections: int = 0
    indexer_scores: int = 0
    indexer_loss: int = 0
    router: int = 0
    routed_experts: int = 0
    shared_expert: int = 0
    hyper_connections: int = 0
    head: int = 0
    mtp: int = 0

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def partly_frozen(self) -> int:
        """Of `training_flops`, the forward of everything and the backward of indexers: a lower bound of a step in
        which some parameters are frozen. The backward of the rest depends on which, and is left out."""
        parts = self.as_dict()
        return sum(flops if name.startswith("indexer") else flops // 3 for name, flops in parts.items())


@dataclass(frozen=True)
class Pairs:
    """All that FLOPs depend on of documents: their tokens, and query-key pairs of one head of one layer.

    Those of several sets of documents add up, so that a record of the sums lets anybody count the FLOPs again.
    """

    tokens: int
    window: int
    csa_selected: int
    csa_visible: int
    hca: int

    @classmethod
    def of(cls, config: DeepSeekV4Config, document_lengths: Sequence[int]) -> Pairs:
        """Of documents by their lengths; all zero without any. Raises DataError on an empty document."""
        return _count(config, document_lengths) if document_lengths else cls(0, 0, 0, 0, 0)


def forward_flops(
    config: DeepSeekV4Config, document_lengths: Sequence[int], *, mtp: bool = True, dense_csa: bool = False
) -> FlopsBreakdown:
    """FLOPs of one forward pass over the documents (lengths in tokens, without padding).

    Raises DataError when there is no document or one is empty.
    """
    return _forward(config, _count(config, document_lengths), mtp, dense_csa, run_indexer=not dense_csa)


def training_flops(
    config: DeepSeekV4Config,
    document_lengths: Sequence[int],
    *,
    mtp: bool = True,
    indexer_loss: IndexerLoss = "selected",
    dense_csa: bool = False,
) -> FlopsBreakdown:
    """FLOPs of one forward and backward over the documents; conventions above.

    Raises DataError when there is no document or one is empty.
    """
    counts = _count(config, document_lengths)
    return pairs_flops(config, counts, mtp=mtp, indexer_loss=indexer_loss, dense_csa=dense_csa)


def pairs_flops(
    config: DeepSeekV4Config,
    counts: Pairs,
    *,
    mtp: bool = True,
    indexer_loss: IndexerLoss = "selected",
    dense_csa: bool = False,
) -> FlopsBreakdown:
    """`training_flops` of documents of which only the sums are known."""
    trained = indexer_loss != "none"
    forward = _forward(config, counts, mtp, dense_csa, run_indexer=trained or not dense_csa)
    training = {name: 3 * value for name, value in forward.as_dict().items()}
    training["indexer_projections"] = (2 if trained else 1) * forward.indexer_projections
    training["indexer_scores"] = forward.indexer_scores
    if trained:
        learnt = counts.csa_selected if indexer_loss == "selected" and not dense_csa else counts.csa_visible
        layers = config.count_layers(LayerKind.CSA)
        training["indexer_scores"] += 2 * layers * _score_flops(config) * learnt
        unread = 0 if dense_csa or indexer_loss == "selected" else counts.csa_visible - counts.csa_selected
        training["indexer_loss"] = layers * 2 * config.num_attention_heads * config.head_dim * unread
    return FlopsBreakdown(**training)


def training_flops_per_token(
    config: DeepSeekV4Config,
    document_lengths: Sequence[int],
    *,
    mtp: bool = True,
    indexer_loss: IndexerLoss = "selected",
    dense_csa: bool = False,
) -> float:
    """`training_flops` divided by the documents' tokens."""
    total = training_flops(config, document_lengths, mtp=mtp, indexer_loss=indexer_loss, dense_csa=dense_csa).total
    return total / sum(document_lengths)


def model_flops_utilisation(flops_per_second: float, peak_flops_per_second: float) -> float:
    """Share of the peak (0 to 1) spent on model arithmetic.

    Convention: `flops_per_second` is `training_flops(...).total` of the real tokens over wall-clock time, so
    recomputation and padding lower it; the peak is that of all devices used, in the precision of the matrix
    products, and is stated beside the figure (data sheet or measured; die or chip).
    """
    if peak_flops_per_second <= 0:
        raise FullweightError(f"peak must be positive FLOP/s, found {peak_flops_per_second}")
    return flops_per_second / peak_flops_per_second


def layer_flops(config: DeepSeekV4Config, document_lengths: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Forward FLOPs of each main layer, and of all that follows the last one: collapse, head and MTP layer.

    Together they are `forward_flops(...).total`. Raises DataError when there is no document or one is empty.
    """
    counts = _count(config, document_lengths)
    whole = _forward(config, counts, mtp=True, dense_csa=False, run_indexer=True)
    collapse = _hyper_connection_flops(config)[1] * counts.tokens
    ratios = config.compress_ratios[: config.num_hidden_layers]
    cost = {}
    for ratio in set(ratios):
        alone = {"num_hidden_layers": 1, "compress_ratios": (ratio,), "num_nextn_predict_layers": 0}
        one = _forward(config.model_copy(update=alone), counts, mtp=False, dense_csa=False, run_indexer=True)
        cost[ratio] = one.total - one.head - collapse
    return tuple(cost[ratio] for ratio in ratios), whole.head + whole.mtp + collapse


def choice_flops(config: DeepSeekV4Config) -> int:
    """Forward FLOPs of one token in one routed expert: what a dropped choice takes off."""
    return 2 * _expert_parameters(config)


def parameters_by_component(config: DeepSeekV4Config) -> dict[str, int]:
    """Trainable parameters by component; `mtp` holds the whole MTP layer, the rest the main model.

    The sum is `config.num_parameters(mtp=True)`. Router biases and hash tables are buffers, not counted.
    """
    d, c, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    layers, n = config.num_hidden_layers, config.hc_mult
    csa, hca = config.count_layers(LayerKind.CSA), config.count_layers(LayerKind.HCA)
    index = config.index_head_dim
    block = {
        "q_a": d * rank,
        "q_b": c * heads * rank,
        "kv": c * d,
        "o_a": c * heads * config.o_lora_rank,
        "o_b": config.o_groups * config.o_lora_rank * d,
        "norms_and_sinks": rank + c + heads + 2 * d,
        "router": config.n_routed_experts * d,
        "routed_experts": config.n_routed_experts * _expert_parameters(config),
        "shared_expert": _expert_parameters(config),
        "hyper_connections": 2 * ((2 + n) * n * (n * d + 1) + 3),
    }
    collapse = n * (n * d + 1) + 1
    total = {"embed": config.vocab_size * d, "head": config.vocab_size * d}
    total |= {name: layers * value for name, value in block.items()}
    total["norms_and_sinks"] += d
    total["hyper_connections"] += collapse
    total["csa_compressor"] = csa * (2 * 2 * c * d + CSA_RATIO * 2 * c + c)
    total["hca_compressor"] = hca * (2 * c * d + HCA_RATIO * c + c)
    index_compressor = 2 * 2 * index * d + CSA_RATIO * 2 * index + index
    total["indexer"] = csa * (index_compressor + config.index_n_heads * (index * rank + d))
    if config.num_nextn_predict_layers:
        total["mtp"] = sum(block.values()) + 2 * d * d + 3 * d + collapse
    return total


def _forward(
    config: DeepSeekV4Config, counts: Pairs, mtp: bool, dense_csa: bool, run_indexer: bool
) -> FlopsBreakdown:
    d, layers, tokens = config.hidden_size, config.num_hidden_layers, counts.tokens
    csa, hca = config.count_layers(LayerKind.CSA), config.count_layers(LayerKind.HCA)
    c, heads, index = config.head_dim, config.num_attention_heads, config.index_head_dim
    pair = 4 * c * heads  # query-key and probability-value products of all heads
    block = _block_flops(config)
    hc_sublayer, hc_collapse = _hyper_connection_flops(config)
    head = 2 * config.vocab_size * d
    mtp_flops = 0
    if mtp and config.num_nextn_predict_layers:
        projections = 2 * d * d * (1 + config.hc_mult)
        per_token = sum(block.values()) + 2 * hc_sublayer + hc_collapse + projections + head
        mtp_flops = tokens * per_token + pair * counts.window
    indexer_weights = config.index_n_heads * (index * config.q_lora_rank + d) + 4 * index * d
    return FlopsBreakdown(
        **{name: layers * value * tokens for name, value in block.items()},
        window_attention=layers * pair * counts.window,
        csa_attention=csa * pair * (counts.csa_visible if dense_csa else counts.csa_selected),
        hca_attention=hca * pair * counts.hca,
        compressors=2 * d * c * (4 * csa + 2 * hca) * tokens,
        indexer_projections=2 * csa * indexer_weights * tokens if run_indexer else 0,
        indexer_scores=csa * _score_flops(config) * counts.csa_visible if run_indexer else 0,
        hyper_connections=(2 * layers * hc_sublayer + hc_collapse) * tokens,
        head=head * tokens,
        mtp=mtp_flops,
    )


def _block_flops(config: DeepSeekV4Config) -> dict[str, int]:
    """Per token and layer: what every layer does alike, without hyper-connections and attention pairs."""
    d, width, rank = config.hidden_size, config.head_dim * config.num_attention_heads, config.q_lora_rank
    output = config.o_lora_rank * (width + config.o_groups * d)
    return {
        "attention_projections": 2 * (d * rank + rank * width + d * config.head_dim + output),
        "router": 2 * d * config.n_routed_experts,
        "routed_experts": 2 * config.num_experts_per_tok * _expert_parameters(config),
        "shared_expert": 2 * _expert_parameters(config),
    }


def _expert_parameters(config: DeepSeekV4Config) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def _hyper_connection_flops(config: DeepSeekV4Config) -> tuple[int, int]:
    """Per token: (one sublayer, the final collapse of the streams): weights' projection plus mixing."""
    n, d = config.hc_mult, config.hidden_size
    return 2 * (2 + n) * n * n * d + 2 * n * d + 2 * n * n * d + 2 * n * d, 2 * n * n * d + 2 * n * d


def _score_flops(config: DeepSeekV4Config) -> int:
    """One token against one compressed entry in the indexer, all its heads."""
    return 2 * config.index_n_heads * config.index_head_dim


def _count(config: DeepSeekV4Config, document_lengths: Sequence[int]) -> Pairs:
    lengths = [int(n) for n in document_lengths]
    if not lengths or min(lengths) < 1:
        raise DataError(f"FLOPs are counted over documents of at least one token, found lengths {lengths}")
    return Pairs(
        tokens=sum(lengths),
        window=sum(_sum_capped(n, 1, config.sliding_window) for n in lengths),
        csa_selected=sum(_sum_capped(n, CSA_RATIO, config.index_topk) for n in lengths),
        csa_visible=sum(_sum_capped(n, CSA_RATIO, n) for n in lengths),
        hca=sum(_sum_capped(n, HCA_RATIO, n) for n in lengths),
    )


def _sum_capped(length: int, ratio: int, cap: int) -> int:
    """Sum over s = 1..length of min(floor(s / ratio), cap).

    >>> _sum_capped(9, 4, 1), sum(min(s // 4, 1) for s in range(1, 10))
    (6, 6)
    """
    steps = min(length // ratio, cap)  # the value at the end; each value below it is held `ratio` times
    return ratio * steps * (steps - 1) // 2 + steps * (length - steps * ratio + 1)
