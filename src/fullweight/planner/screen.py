"""A quick look at a layout's memory, for a search over tens of thousands: which are worth a replay (`memory.py`).

Beside recorded rehearsals of Flash and Pro it is between 47 % low, where a schedule puts weight gradients off, and
2 % high, one layout with Muon 9 %. A layout that it finds more than `CLOSE` times too large does not fit, one that
it finds small enough is counted.
Models narrower than `SMALL` are counted at once. State is exact; activations are counted tensor by tensor for
each kind of block (`_kept`), times the micro-batches that the schedule holds at once; temporaries and buffers are
what a block's backward pass needs beside that.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from fullweight.models.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.parts import Part, parts_of
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.parallel.stages import stages_of
from fullweight.planner.memory import MemoryModel, Setting, StageMemory
from fullweight.planner.shards import buffer_bytes

_FP32, _BF16, _INT64 = 4, 2, 8
_PIECE = 2**25  # bytes of gathered entries that sparse attention has at a time
CLOSE = 1.1
SMALL = 1024  # widths below it: what is left out here is much of such a model, and a replay of it is quick


def screened(
    model: MemoryModel, parallel: ParallelConfig, layout: Layout, setting: Setting
) -> Iterator[StageMemory]:
    """Every pipeline rank, in order, each looked at when it is asked for."""
    parts = parts_of(model.stages(parallel, setting.row_tokens))
    for rank in range(layout.pipeline):
        mine = stages_of(rank, layout.pipeline, len(parts), parallel.schedule)
        yield _rank_memory(model, parallel, layout, setting, rank, [parts[s] for s in mine])


@cache
def in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> list[tuple[int, ...]]:
    """Moments of the schedule: micro-batches whose activations each of the rank's stages holds at once.

    >>> in_flight(ParallelConfig(pipeline=4), 1, 8), in_flight(ParallelConfig(pipeline=4), 1, 2)
    ([(3,)], [(2,)])
    """
    ranks, virtual = parallel.pipeline, parallel.virtual_stages
    if ranks == 1:
        return [(1,)]
    if virtual == 1:
        return [(min(ranks - rank, micro_batches),)]
    if parallel.schedule == "zbv":
        return [(min(ranks * 2 - 1 - rank, micro_batches), min(rank + 1, micro_batches))]
    # torch's interleaved schedules: rounds of micro-batches through all stages, then one forward for one backward
    each_round = micro_batches // max(1, micro_batches // ranks)
    total = virtual * micro_batches
    ahead = 1 if parallel.schedule == "zero_bubble" else 2  # what torch's schedules are ahead of the next rank by
    warm_up = min((virtual - 1) * each_round + ahead * (ranks - 1 - rank), total)
    now, moments = [0] * virtual, set()
    for number in range(total):
        now[number // each_round % virtual] += 1
        moments.add(tuple(now))
        if number >= warm_up:
            now[virtual - 1 - (number - warm_up) // each_round % virtual] -= 1
    return sorted(moments)


def _rank_memory(
    model: MemoryModel,
    parallel: ParallelConfig,
    layout: Layout,
    setting: Setting,
    rank: int,
    parts: Sequence[Part],
) -> StageMemory:
    config, adamw = model.config, setting.optimizer == "adamw"
    layers = [layer for part in parts for layer in part.layers]
    first, last = any(part.is_first for part in parts), any(part.is_last for part in parts)
    mtp = last and config.num_nextn_predict_layers > 0
    everywhere = [*layers, *([config.num_hidden_layers] if mtp else [])]
    kinds = [model.kind(layer) for layer in everywhere]
    one_of = dict(zip(kinds, everywhere, strict=True))
    of_kind = {kind: model.block(layout, layer, adamw)[0] for kind, layer in one_of.items()}
    blocks = [of_kind[kind] for kind in kinds]
    root = model.root(layout, first, last, adamw)[0]
    numbers = root.here + sum(b.here for b in blocks)
    moments = 0 if parallel.offload_optimizer else root.moments + sum(b.moments for b in blocks)
    whole = [_FP32 * b.gathered for b in blocks]
    staged = layout.pipeline > 1 and parallel.reshard_after == "step"
    gathered = _FP32 * root.gathered + (sum(whole) if staged else max(whole, default=0))
    tokens = setting.row_tokens // layout.num_slices
    kept = _activations(config, parallel, layout, setting, parts, rank, tokens)
    attention, experts, table, head = _temporaries(
        config, parallel, layout, setting, layers, mtp, tokens, first, last
    )
    block = max(attention, experts)
    rows = _rows(config, layout, setting, tokens)
    reduced = _FP32 * (root.gathered + blocks[0].gathered_alike)
    if layout.pipeline > 1 and not staged:
        reduced = _FP32 * 2 * root.gathered  # a micro-batch's gradient on its way beside the sum
    exchanged = ((b.gathered_alike, b.gathered - b.gathered_alike) for b in blocks[: len(layers)])
    largest = _FP32 * max(max(pair) for pair in exchanged)
    payload = _payloads(parallel, rank) * tokens * (config.hc_mult + 1) * config.hidden_size * _BF16
    buffers = max(reduced, largest + 3 * rows, rows + payload)
    parameters = _FP32 * numbers + buffer_bytes(config, everywhere)
    gradients, optimizer = _FP32 * numbers, _FP32 * moments
    own = gradients if setting.micro_batches > 1 else 0
    if staged:
        # stages add up micro-batches: whole gradients of what is gathered wait for the step's end
        waiting = gathered
        temporary = waiting + max(block, table, head)
        own = gradients - _FP32 * (root.here_gathered + sum(b.here_gathered for b in blocks))
        backward = temporary
        flights = max(map(sum, in_flight(parallel, rank, setting.micro_batches)))
        if flights == setting.micro_batches * parallel.virtual_stages:
            # all forward passes come first: no gradient is there before some activations have gone
            made = (waiting + own) // parallel.virtual_stages - kept // flights
            backward, own = max(block, table, head) + max(made, 0), 0
    else:
        waiting = _FP32 * root.gathered
        # a block's experts come first in backward and are reduced before its attention's gradients are made
        made = _FP32 * max((b.gathered - b.gathered_routed for b in blocks[: len(layers)]), default=0)
        of_head = table if waiting and last else 0
        temporary = max(waiting, head, attention + made + of_head, experts + of_head)
        backward = max(block, head)
    backward += gathered + own + kept + 4 * rows + (payload // 2 if parallel.virtual_stages > 1 else 0)
    reducing = gathered + waiting + gradients + buffers
    routed = sum(b.routed_here * 2 + (0 if parallel.offload_optimizer else b.routed_moments) for b in blocks)
    peak = parameters + optimizer + max(backward, reducing)
    by_category = (parameters, optimizer, gradients, gathered, kept, buffers, temporary)
    return StageMemory(rank, *by_category, peak, _FP32 * routed)


def _activations(
    config: DeepSeekV4Config,
    parallel: ParallelConfig,
    layout: Layout,
    setting: Setting,
    parts: Sequence[Part],
    rank: int,
    tokens: int,
) -> int:
    """Kept for backward by all micro-batches in flight."""
    d, n = config.hidden_size, config.hc_mult
    payload = n * d * _BF16 + (d * _BF16 if config.num_nextn_predict_layers else 0)
    staged = layout.pipeline > 1
    weights = []
    known: dict[object, float] = {}

    def of_layer(layer: int) -> float:
        kind = config.layer_kind(layer), config.is_hash_layer(layer)
        if kind not in known:
            known[kind] = _kept(config, parallel.recompute, layout, layer, setting)
        return known[kind]

    for part in parts:
        one = sum(of_layer(layer) for layer in part.layers)
        one += payload if staged or part.is_first else 0.0  # what came in, or the embedding
        one += 4 * 2 * config.qk_rope_head_dim + 48  # cosines and sines of both kinds; ids, positions, masks
        if part.is_last:
            one += _kept_behind(config, parallel.recompute, layout, setting)
        weights.append(one)
    moments = in_flight(parallel, rank, setting.micro_batches)
    total = max(sum(w * f for w, f in zip(weights, flight, strict=True)) for flight in moments)
    if staged:
        # a first stage's own output, or what has come for later micro-batches
        ahead = min(3, setting.micro_batches - min(max(moments)) + 1)
        if len(parts) == 1 and (parts[0].is_first or parts[0].is_last):
            ahead = 0
        waiting = ahead + (1 if parts[0].is_first else 0)
        total += waiting * payload
    # gradients of the head are made in forward, for both losses
    heads = 2 * _FP32 * config.vocab_size * d if any(part.is_last for part in parts) else 0
    return int(total * tokens + heads)


def _kept(config: DeepSeekV4Config, policy: str, layout: Layout, layer: int, setting: Setting) -> float:
    """Bytes that one main layer (or the MTP block's) keeps of each token of the rank's slice."""
    d, n, k = config.hidden_size, config.hc_mult, config.num_experts_per_tok
    streams = n * d * _BF16
    is_mtp = layer == config.num_hidden_layers
    kind = LayerKind.SLIDING if is_mtp else config.layer_kind(layer)
    indices = (5 if layout.expert > 1 and policy == "full" else 2) * k * _INT64
    if policy == "full":
        return streams + indices + (16 if kind is LayerKind.CSA else 0)
    c, heads, q, experts = config.head_dim, config.num_attention_heads, config.q_lora_rank, config.n_routed_experts
    f, index, index_heads = config.moe_intermediate_size, config.index_head_dim, config.index_n_heads
    maps = (2 + n) * n
    attention: float = q * _BF16 + c * _BF16 + heads * c * _BF16 + config.o_groups * config.o_lora_rank * _BF16
    attention += 2 * heads * _FP32 + 4 * _FP32
    if layout.tensor > 1:
        attention += layout.tensor * (q + c) * _BF16 + d * _BF16
    if kind is LayerKind.CSA:
        attention += 2 * 2 * c * _FP32 + c * (_FP32 + _BF16) / CSA_RATIO
        attention += 2 * 2 * index * _FP32 + 2 * index * _FP32 / CSA_RATIO
        attention += index_heads * index * _BF16 + index_heads * _FP32
        attention += config.index_topk * _INT64 + 20
        if layout.tensor > 1:
            attention += config.index_topk * _INT64 * layout.tensor
    elif kind is LayerKind.HCA:
        attention += 2 * c * _FP32 + c * (_FP32 + _BF16) / HCA_RATIO
    hyper = 2 * maps * _FP32 + 2 * n * n * _FP32 + 4 * n * _FP32 + 2 * _FP32
    if setting.operations == "ascend":  # plain torch keeps the streams in fp32, thrice for each sublayer
        sinkhorn = (2 * config.hc_sinkhorn_iters - 1) * (n * n + n)
        hyper += 2 * (3 * n * d + d + sinkhorn) * _FP32
        attention += heads * c * _BF16  # the output before it is rotated back too
    gate = 3 * experts * _FP32 + (0 if config.is_hash_layer(layer) else experts * _FP32) + k * 12 + 16
    routed: float = indices + 4 * k
    if policy == "none":
        skew = setting.load
        routed += k * 2 * f * _BF16 * skew + (k * (d * _BF16 + 64) * skew if layout.expert > 1 else 0)
    shared = 2 * f * _BF16 + d * _BF16
    return streams + attention + hyper + gate + routed + shared


def _kept_behind(config: DeepSeekV4Config, policy: str, layout: Layout, setting: Setting) -> float:
    """Bytes of each token that the heads and the MTP block keep."""
    d, n = config.hidden_size, config.hc_mult
    heads = 2 * d * _BF16
    if not config.num_nextn_predict_layers:
        return heads
    return heads + 3 * d * _BF16 + n * d * _BF16 + _kept(config, policy, layout, config.num_hidden_layers, setting)


def _temporaries(
    config: DeepSeekV4Config,
    parallel: ParallelConfig,
    layout: Layout,
    setting: Setting,
    layers: Sequence[int],
    mtp: bool,
    tokens: int,
    first: bool,
    last: bool,
) -> tuple[int, int, int, int]:
    """Beside what was kept: in backward of attention, of experts, of the embedding, and in the head's forward."""
    d, n, c, heads = config.hidden_size, config.hc_mult, config.head_dim, config.num_attention_heads
    f, k = config.moe_intermediate_size, config.num_experts_per_tok
    sparse = any(config.layer_kind(layer) is LayerKind.CSA for layer in layers)
    behind = [config.num_hidden_layers] if mtp else []
    made_again, routed_again = 0.0, 0.0
    rows = k * 2 * f * _BF16 * setting.load + (k * d * _BF16 * setting.load if layout.expert > 1 else 0)
    if parallel.recompute == "full":
        routed_again = rows + (2 * f + d) * _BF16
        made_again = (
            max(_kept(config, "none", layout, i, setting) for i in _of_each_kind(config, layers, behind))
            - n * d * _BF16
        )
    elif parallel.recompute == "selective":
        made_again = routed_again = rows
    pieces = 2 * min(tokens * layout.tensor * config.index_topk * c * _BF16, _PIECE) if sparse else 0
    # experts come first in backward: what was made again for them is gone when attention's turn comes
    attention = (made_again - routed_again + 6 * heads * c * _BF16) * tokens + pieces
    routed = (made_again + 2 * heads * c * _BF16 + k * d * _BF16 * setting.load) * tokens
    # gradients of the block's experts before they join the sum over micro-batches
    routed += _FP32 * 3 * d * f * config.n_routed_experts // layout.expert
    streams = 2 * n * d * _BF16 * tokens
    # a micro-batch's gradient of the embedding beside the sum; the head in the compute type, and parts of it
    table = config.vocab_size * d * _FP32 if first else 0
    head = 3 * config.vocab_size * d * _BF16 if last else 0
    return int(streams + attention), int(streams + routed), table, head


def _of_each_kind(config: DeepSeekV4Config, layers: Sequence[int], behind: Sequence[int]) -> list[int]:
    """One layer of each kind, and what lies behind them."""
    kinds = {(config.layer_kind(layer), config.is_hash_layer(layer)): layer for layer in layers}
    return [*kinds.values(), *behind]


def _payloads(parallel: ParallelConfig, rank: int) -> int:
    """Stage inputs and their gradients that have buffers at once: as many as rehearsals showed."""
    if parallel.virtual_stages == 1:
        return 2 if rank > 0 else 0
    return (4 if rank > 0 else 2) * parallel.virtual_stages


def _rows(config: DeepSeekV4Config, layout: Layout, setting: Setting, tokens: int) -> int:
    """Rows that a rank's experts get, in the compute type."""
    if layout.expert == 1:
        return 0
    return int(config.num_experts_per_tok * tokens * config.hidden_size * _BF16 * setting.load)
