"""A quick look at a layout's memory, for a search over tens of thousands: which are worth a replay (`memory.py`).

Beside recorded rehearsals of Flash and Pro it is between 47 % low, where a schedule puts weight gradients off,
and 2 % high, one layout with Muon 9 %, and 15 % beside replays of interleaved schedules with few micro-batches.
A layout that it finds more than `CLOSE` times too large does not fit, one that it finds small enough is counted.
Models narrower than `SMALL` are counted at once. State is exact; activations are counted tensor by tensor for
each kind of block (`_kept`), times the micro-batches that the schedule holds at once; temporaries and buffers
are what a block's backward pass needs beside that. A search asks of tens of thousands of layouts, so what does
not depend on all of a layout is counted once: sums of parameters by how they are cut, bytes that a kind of block
keeps by what is recomputed. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from fullweight.models.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.parts import Part
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.parallel.stages import Schedule
from fullweight.planner.memory import MemoryModel, Mine, Setting, StageMemory
from fullweight.planner.operations import SETS, Operations

_FP32, _BF16, _INT64 = 4, 2, 8
_PIECE = 2**25  # bytes of gathered entries that sparse attention has at a time
CLOSE = 1.2
SMALL = 1024  # widths below it: what is left out here is much of such a model, and a replay of it is quick


@dataclass(frozen=True)
class _How:
    """What decides the bytes that a token's activations take, beside the model."""

    policy: str
    tensor: int
    dealt: bool  # experts over ranks
    staged: bool
    operations: type[Operations]
    load: float
    row_tokens: int


@dataclass(eq=False)
class _Tokens:
    """Bytes of one token, counted when they are first asked for."""

    kept: dict[Mine, list[float]] = field(default_factory=dict)  # of each of a rank's stages
    again: dict[Mine, float] = field(default_factory=dict)  # made again in backward, of the dearest block


@dataclass(frozen=True)
class _State:
    """Numbers of parameters on a rank: its own, and of blocks as they are gathered."""

    here: int
    moments: int
    root: int  # gathered, outside of blocks
    blocks: int  # gathered, of all blocks
    block: int  # of the largest
    alike: int  # of the first one, without experts and heads that are dealt
    exchanged: int  # the most at once, of main layers
    unrouted: int  # of the main layer that has most without experts
    own: int  # the rank's part of all that is gathered
    routed: int
    routed_moments: int


class Screen:
    """Quick looks at layouts of one model."""

    def __init__(self, model: MemoryModel) -> None:
        self._model, self._config = model, model.config
        self._tokens: dict[_How, _Tokens] = {}
        self._states: dict[tuple[object, ...], _State] = {}

    def ranks(self, parallel: ParallelConfig, layout: Layout, setting: Setting) -> Iterator[StageMemory]:
        """Every pipeline rank, in order, each looked at when it is asked for."""
        for rank in range(layout.pipeline):
            yield self._rank(parallel, layout, setting, rank)

    def _rank(self, parallel: ParallelConfig, layout: Layout, setting: Setting, rank: int) -> StageMemory:
        config = self._config
        mine = self._model.mine(parallel, setting.row_tokens, rank)
        have = self._state(layout, mine, adamw=setting.optimizer == "adamw")
        staged = layout.pipeline > 1 and parallel.reshard_after == "step"
        gathered = _FP32 * (have.root + (have.blocks if staged else have.block))
        tokens = setting.row_tokens // layout.num_slices
        load = setting.load
        how = _How(
            parallel.recompute,
            layout.tensor,
            layout.expert > 1,
            layout.pipeline > 1,
            SETS[setting.operations],
            load,
            setting.row_tokens,
        )
        kept = self._activations(how, parallel, mine, rank, setting.micro_batches, tokens)
        attention, experts, table, head = self._temporaries(how, layout.expert, mine, tokens)
        block = max(attention, experts)
        # rows that a rank's experts get, in the compute type
        rows = int(config.num_experts_per_tok * tokens * config.hidden_size * _BF16 * load) if how.dealt else 0
        reduced = _FP32 * (have.root + have.alike)
        if layout.pipeline > 1 and not staged:
            reduced = _FP32 * 2 * have.root  # a micro-batch's gradient on its way beside the sum
        payload = _payloads(parallel, rank) * tokens * (config.hc_mult + 1) * config.hidden_size * _BF16
        buffers = max(reduced, _FP32 * have.exchanged + 3 * rows, rows + payload)
        parameters = _FP32 * have.here + mine.buffers
        gradients, optimizer = _FP32 * have.here, 0 if parallel.offload_optimizer else _FP32 * have.moments
        own = gradients if setting.micro_batches > 1 else 0
        if staged:
            # stages add up micro-batches: whole gradients of what is gathered wait for the step's end
            waiting = gathered
            temporary = waiting + max(block, table, head)
            own = gradients - _FP32 * have.own
            backward = temporary
            flights = max(map(sum, in_flight(parallel, rank, setting.micro_batches)))
            if flights == setting.micro_batches * parallel.virtual_stages:
                # all forward passes come first: no gradient is there before some activations have gone
                made = (waiting + own) // parallel.virtual_stages - kept // flights
                backward, own = max(block, table, head) + max(made, 0), 0
        else:
            waiting = _FP32 * have.root
            # a block's experts come first in backward and are reduced before its attention's gradients are made
            of_head = table if waiting and mine.last else 0
            temporary = max(waiting, head, attention + _FP32 * have.unrouted + of_head, experts + of_head)
            backward = max(block, head)
        backward += gathered + own + kept + 4 * rows + (payload // 2 if parallel.virtual_stages > 1 else 0)
        reducing = gathered + waiting + gradients + buffers
        routed = 2 * have.routed + (0 if parallel.offload_optimizer else have.routed_moments)
        peak = parameters + optimizer + max(backward, reducing)
        by_category = (parameters, optimizer, gradients, gathered, kept, buffers, temporary)
        return StageMemory(rank, *by_category, peak, _FP32 * routed)

    def _state(self, layout: Layout, mine: Mine, *, adamw: bool) -> _State:
        key = (mine, layout.shard * layout.context, layout.replicate, layout.tensor, layout.expert, adamw)
        if key not in self._states:
            model = self._model
            root = model.root(layout, mine.first, mine.last, adamw)[0]
            blocks = [model.block(layout, layer, adamw)[0] for layer in mine.everywhere]
            main = blocks[: len(mine.layers)]
            self._states[key] = _State(
                here=root.here + sum(b.here for b in blocks),
                moments=root.moments + sum(b.moments for b in blocks),
                root=root.gathered,
                blocks=sum(b.gathered for b in blocks),
                block=max(b.gathered for b in blocks),
                alike=blocks[0].gathered_alike,
                exchanged=max(max(b.gathered_alike, b.gathered - b.gathered_alike) for b in main),
                unrouted=max(b.gathered - b.gathered_routed for b in main),
                own=root.here_gathered + sum(b.here_gathered for b in blocks),
                routed=sum(b.routed_here for b in blocks),
                routed_moments=sum(b.routed_moments for b in blocks),
            )
        return self._states[key]

    def _of_tokens(self, how: _How) -> _Tokens:
        if how not in self._tokens:
            self._tokens[how] = _Tokens()
        return self._tokens[how]

    def _activations(
        self, how: _How, parallel: ParallelConfig, mine: Mine, rank: int, micro_batches: int, tokens: int
    ) -> int:
        """Kept for backward by all micro-batches in flight."""
        config, parts, known = self._config, mine.parts, self._of_tokens(how).kept
        d = config.hidden_size
        payload = config.hc_mult * d * _BF16 + (d * _BF16 if config.num_nextn_predict_layers else 0)
        if mine not in known:
            layers = {self._kind(layer): _kept(config, how, layer) for layer in mine.layers}
            known[mine] = [self._kept_by(how, part, layers, payload) for part in parts]
        weights = known[mine]
        moments = in_flight(parallel, rank, micro_batches)
        total = max(sum([w * f for w, f in zip(weights, flight, strict=True)]) for flight in moments)
        if how.staged:
            # a first stage's own output, or what has come for later micro-batches
            ahead = min(3, micro_batches - min(max(moments)) + 1)
            if len(parts) == 1 and (parts[0].is_first or parts[0].is_last):
                ahead = 0
            waiting = ahead + (1 if parts[0].is_first else 0)
            total += waiting * payload
        # gradients of the head are made in forward, for both losses, but where logits are made again
        in_forward = mine.last and how.operations.head_in_forward
        heads = 2 * _FP32 * config.vocab_size * d if in_forward else 0
        return int(total * tokens + heads)

    def _kind(self, layer: int) -> tuple[LayerKind, bool]:
        return self._config.layer_kind(layer), self._config.is_hash_layer(layer)

    def _kept_by(self, how: _How, part: Part, layers: dict[tuple[LayerKind, bool], float], payload: int) -> float:
        """Bytes that a stage keeps of each token."""
        one = sum(layers[self._kind(layer)] for layer in part.layers)
        one += payload if how.staged or part.is_first else 0.0  # what came in, or the embedding
        one += 4 * 2 * self._config.qk_rope_head_dim + 48  # cosines and sines of both kinds; ids, positions, masks
        if part.is_last:
            one += _kept_behind(self._config, how)
        return one

    def _temporaries(self, how: _How, expert: int, mine: Mine, tokens: int) -> tuple[int, int, int, int]:
        """Beside what was kept: in backward of attention, of experts, of the embedding, and in the head's
        forward."""
        config, known = self._config, self._of_tokens(how).again
        d, n, c, heads = config.hidden_size, config.hc_mult, config.head_dim, config.num_attention_heads
        f, k = config.moe_intermediate_size, config.num_experts_per_tok
        rows = k * 2 * f * _BF16 * how.load + (k * d * _BF16 * how.load if how.dealt else 0)
        if mine not in known:
            known[mine] = self._made_again(how, mine, rows)
        made_again = known[mine]
        routed_again = 0.0 if how.policy == "none" else rows
        if how.policy == "full":
            routed_again += (2 * f + d) * _BF16
        sparse = LayerKind.CSA in mine.kinds[: len(mine.layers)]
        pieces = 2 * min(tokens * how.tensor * config.index_topk * c * _BF16, _PIECE) if sparse else 0
        # experts come first in backward: what was made again for them is gone when attention's turn comes
        attention = (made_again - routed_again + 6 * heads * c * _BF16) * tokens + pieces
        routed = (made_again + 2 * heads * c * _BF16 + k * d * _BF16 * how.load) * tokens
        # gradients of the block's experts before they join the sum over micro-batches
        routed += _FP32 * 3 * d * f * config.n_routed_experts // expert
        streams = 2 * n * d * _BF16 * tokens
        # a micro-batch's gradient of the embedding beside the sum; the head in the compute type, and parts of it,
        # or parts of its gradient as they are added up
        table = config.vocab_size * d * _FP32 if mine.first else 0
        number = _BF16 if how.operations.head_in_forward else _FP32
        head = 3 * config.vocab_size * d * number if mine.last else 0
        return int(streams + attention), int(streams + routed), table, head

    def _made_again(self, how: _How, mine: Mine, rows: float) -> float:
        if how.policy != "full":
            return rows if how.policy == "selective" else 0.0
        of_each_kind = {self._kind(layer): layer for layer in mine.layers}.values()
        behind = mine.everywhere[len(mine.layers) :]
        whole = replace(how, policy="none")
        dearest = max(_kept(self._config, whole, layer) for layer in (*of_each_kind, *behind))
        return dearest - self._config.hc_mult * self._config.hidden_size * _BF16


def in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> list[tuple[int, ...]]:
    """Moments of the schedule: micro-batches whose activations each of the rank's stages holds at once.

    >>> in_flight(ParallelConfig(pipeline=4), 1, 8), in_flight(ParallelConfig(pipeline=4), 1, 2)
    ([(3,)], [(2,)])
    """
    return _in_flight(parallel.schedule, parallel.pipeline, parallel.virtual_stages, rank, micro_batches)


@cache
def _in_flight(
    schedule: Schedule, ranks: int, virtual: int, rank: int, micro_batches: int
) -> list[tuple[int, ...]]:
    if ranks == 1:
        return [(1,)]
    if virtual == 1:
        return [(min(ranks - rank, micro_batches),)]
    if schedule == "zbv":
        return [(min(ranks * 2 - 1 - rank, micro_batches), min(rank + 1, micro_batches))]
    # torch's interleaved schedules: rounds of micro-batches through all stages, then one forward for one backward
    each_round = micro_batches // max(1, micro_batches // ranks)
    total = virtual * micro_batches
    ahead = 1 if schedule == "zero_bubble" else 2  # what torch's schedules are ahead of the next rank by
    warm_up = min((virtual - 1) * each_round + ahead * (ranks - 1 - rank), total)
    now, moments = [0] * virtual, set()
    for number in range(total):
        now[number // each_round % virtual] += 1
        moments.add(tuple(now))
        if number >= warm_up:
            now[virtual - 1 - (number - warm_up) // each_round % virtual] -= 1
    return sorted(moments)


def _kept(config: DeepSeekV4Config, how: _How, layer: int) -> float:
    """Bytes that one main layer (or the MTP block's) keeps of each token of the rank's slice."""
    d, n, k = config.hidden_size, config.hc_mult, config.num_experts_per_tok
    streams = n * d * _BF16
    is_mtp = layer == config.num_hidden_layers
    kind = LayerKind.SLIDING if is_mtp else config.layer_kind(layer)
    indices = (5 if how.dealt and how.policy == "full" else 2) * k * _INT64
    if how.policy == "full":
        return streams + indices + (16 if kind is LayerKind.CSA else 0)
    c, heads, q, experts = config.head_dim, config.num_attention_heads, config.q_lora_rank, config.n_routed_experts
    f, index, index_heads = config.moe_intermediate_size, config.index_head_dim, config.index_n_heads
    maps = (2 + n) * n
    attention: float = q * _BF16 + c * _BF16 + heads * c * _BF16 + config.o_groups * config.o_lora_rank * _BF16
    attention += 2 * heads * _FP32 + 4 * _FP32
    if how.tensor > 1:
        attention += how.tensor * (q + c) * _BF16 + d * _BF16
    if kind is LayerKind.CSA:
        attention += 2 * 2 * c * _FP32 + c * (_FP32 + _BF16) / CSA_RATIO
        attention += 2 * 2 * index * _FP32 + 2 * index * _FP32 / CSA_RATIO
        attention += index_heads * index * _BF16 + index_heads * _FP32
        attention += config.index_topk * _INT64 + 20
        if how.tensor > 1:
            attention += config.index_topk * _INT64 * how.tensor
    elif kind is LayerKind.HCA:
        attention += 2 * c * _FP32 + c * (_FP32 + _BF16) / HCA_RATIO
    hyper = 2 * maps * _FP32 + 2 * n * n * _FP32 + 4 * n * _FP32 + 2 * _FP32
    hyper += how.operations.kept_more(config, kind, how.row_tokens)
    gate = 3 * experts * _FP32 + (0 if config.is_hash_layer(layer) else experts * _FP32) + k * 12 + 16
    routed: float = indices + 4 * k
    if how.policy == "none":
        skew = how.load
        routed += k * 2 * f * _BF16 * skew + (k * (d * _BF16 + 64) * skew if how.dealt else 0)
    shared = 2 * f * _BF16 + d * _BF16
    return streams + attention + hyper + gate + routed + shared


def _kept_behind(config: DeepSeekV4Config, how: _How) -> float:
    """Bytes of each token that the heads and the MTP block keep."""
    d, n = config.hidden_size, config.hc_mult
    heads = 2 * d * _BF16
    if not config.num_nextn_predict_layers:
        return heads
    return heads + 3 * d * _BF16 + n * d * _BF16 + _kept(config, how, config.num_hidden_layers)


def _payloads(parallel: ParallelConfig, rank: int) -> int:
    """Stage inputs and their gradients that have buffers at once: as many as rehearsals showed."""
    if parallel.virtual_stages == 1:
        return 2 if rank > 0 else 0
    return (4 if rank > 0 else 2) * parallel.virtual_stages
