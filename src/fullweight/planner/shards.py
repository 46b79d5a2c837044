"""What one rank holds of each parameter: the shapes of DeepSeek-V4's parameters and how a layout cuts them.

The rules are those of `parallel/apply.py`: experts are dealt over the expert axis, attention's projections over
the tensor axis, and both, like all the rest, are cut by FSDP along their first dimension over the ranks that share
them; a stack of experts that its ranks cannot share matrix by matrix is cut by rows where the optimiser allows it.
A rank counted here is one that holds most. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from fullweight.models.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.roles import parameter_role
from fullweight.models.deepseek_v4.sharding import cut_of
from fullweight.parallel.config import Layout

_FP32 = 4


@dataclass(frozen=True)
class Held:
    """One parameter on one rank, in numbers: its part for good, and whole as it is while in use."""

    name: str
    here: int
    whole: int  # of what this rank computes with: its experts, its heads
    muon: bool
    routed: bool
    own_axis: bool  # dealt over expert or tensor ranks first
    gathered: bool  # FSDP has it: others hold a part or a copy of it
    sharers: int  # ranks that it is cut over
    by_rows: bool  # along its second dimension
    copies: int  # of the part, on ranks with which gradients are summed

    @property
    def padded(self) -> int:
        """Whole, as it is exchanged: every rank's part is as large as the largest."""
        return self.whole if self.by_rows else self.here * self.sharers

    @property
    def moments(self) -> int:
        """Of the optimiser: one of a matrix under Muon, two under AdamW."""
        return self.here * (1 if self.muon else 2)


@dataclass(frozen=True)
class Sums:
    """Numbers of several parameters together on one rank."""

    here: int
    moments: int
    gathered: int  # whole, of what others hold parts of
    gathered_alike: int  # of those, what is cut over the same ranks as all that has no axis of its own
    gathered_routed: int
    here_gathered: int  # the rank's own parts of those
    routed_here: int
    routed_moments: int
    others: int  # of the rank's numbers, those that are not Muon's
    counted: int  # parameters with a counter of AdamW's steps


def sums(parameters: Sequence[Held]) -> Sums:
    """Of a block or of what lies outside."""
    return Sums(
        here=sum(h.here for h in parameters),
        moments=sum(h.moments for h in parameters),
        gathered=sum(h.whole for h in parameters if h.gathered),
        gathered_alike=sum(h.whole for h in parameters if h.gathered and not h.own_axis),
        gathered_routed=sum(h.whole for h in parameters if h.gathered and h.routed),
        here_gathered=sum(h.here for h in parameters if h.gathered),
        routed_here=sum(h.here for h in parameters if h.routed),
        routed_moments=sum(h.moments for h in parameters if h.routed),
        others=sum(h.here for h in parameters if not h.muon),
        counted=sum(not h.muon for h in parameters),
    )


def block_shapes(config: DeepSeekV4Config, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one block's parameters; the layer behind the last is the MTP block."""
    is_mtp = layer == config.num_hidden_layers
    prefix = "mtp.0" if is_mtp else f"layers.{layer}"
    d, c, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    f, experts, n = config.moe_intermediate_size, config.n_routed_experts, config.hc_mult
    shapes: dict[str, tuple[int, ...]] = {
        "attn.wq_a.weight": (rank, d),
        "attn.q_norm.weight": (rank,),
        "attn.wq_b.weight": (heads * c, rank),
        "attn.wkv.weight": (c, d),
        "attn.kv_norm.weight": (c,),
        "attn.wo_a.weight": (config.o_groups * config.o_lora_rank, heads * c // config.o_groups),
        "attn.wo_b.weight": (d, config.o_groups * config.o_lora_rank),
        "attn.attn_sink": (heads,),
        "attn_norm.weight": (d,),
        "ffn_norm.weight": (d,),
        "ffn.gate.weight": (experts, d),
        "ffn.experts.gate_up": (experts, 2 * f, d),
        "ffn.experts.down": (experts, d, f),
        "ffn.shared_experts.gate_up": (2 * f, d),
        "ffn.shared_experts.down": (d, f),
    }
    for sublayer in ("hc_attn", "hc_ffn"):
        shapes[f"{sublayer}_fn"] = ((2 + n) * n, n * d)
        shapes[f"{sublayer}_base"], shapes[f"{sublayer}_scale"] = ((2 + n) * n,), (3,)
    kind = LayerKind.SLIDING if is_mtp else config.layer_kind(layer)
    if kind is LayerKind.CSA:
        shapes |= _compressor("attn.compressor", 2 * c, CSA_RATIO, c, d)
        index = config.index_head_dim
        shapes |= _compressor("attn.indexer.compressor", 2 * index, CSA_RATIO, index, d)
        shapes["attn.indexer.wq_b.weight"] = (config.index_n_heads * index, rank)
        shapes["attn.indexer.weights_proj.weight"] = (config.index_n_heads, d)
    elif kind is LayerKind.HCA:
        shapes |= _compressor("attn.compressor", c, HCA_RATIO, c, d)
    if is_mtp:
        shapes |= {"e_proj.weight": (d, d), "h_proj.weight": (d, d)}
        shapes |= dict.fromkeys(("enorm.weight", "hnorm.weight", "norm.weight"), (d,))
        shapes |= {"hc_head_fn": (n, n * d), "hc_head_base": (n,), "hc_head_scale": (1,)}
    yield from ((f"{prefix}.{name}", shape) for name, shape in shapes.items())


def _compressor(prefix: str, width: int, ratio: int, out: int, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.wkv.weight": (width, d),
        f"{prefix}.wgate.weight": (width, d),
        f"{prefix}.ape": (ratio, width),
        f"{prefix}.norm.weight": (out,),
    }


def root_shapes(config: DeepSeekV4Config, first: bool, last: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What lies outside of all blocks, on the stages that hold the first and the last layer."""
    d, n = config.hidden_size, config.hc_mult
    if first:
        yield "embed.weight", (config.vocab_size, d)
    if last:
        yield "norm.weight", (d,)
        yield "head.weight", (config.vocab_size, d)
        yield from (("hc_head_fn", (n, n * d)), ("hc_head_base", (n,)), ("hc_head_scale", (1,)))


def held(
    config: DeepSeekV4Config, layout: Layout, shapes: Iterator[tuple[str, tuple[int, ...]]], *, adamw: bool
) -> list[Held]:
    """What the rank that holds most has of these parameters."""
    return [_held(config, layout, name, shape, adamw) for name, shape in shapes]


def _held(config: DeepSeekV4Config, layout: Layout, name: str, shape: Sequence[int], adamw: bool) -> Held:
    cut = cut_of(name)
    sizes, sharers = list(shape), layout.dense
    if cut is not None and cut.axis == "expert":
        sizes[0] //= layout.expert
        sharers = layout.expert_shard
    elif cut is not None and layout.tensor > 1:
        sizes[cut.dim] //= layout.tensor
        sharers = layout.shard * layout.context
    whole = prod(sizes)
    routed = cut is not None and cut.axis == "expert"
    by_rows = bool(routed and adamw and sizes[0] % sharers and sizes[1] % sharers == 0)
    if by_rows:
        here = whole // sharers
    else:
        here = ceil(sizes[0] / sharers) * prod(sizes[1:])
    muon = not adamw and parameter_role(name, config).optimizer == "muon"
    own_axis = (routed and layout.expert > 1) or (cut is not None and not routed and layout.tensor > 1)
    copied = sharers * layout.replicate > 1
    return Held(name, here, whole, muon, routed, own_axis, copied, sharers, by_rows, layout.replicate)


def buffer_bytes(config: DeepSeekV4Config, layers: Sequence[int]) -> int:
    """Router biases (fp32) and tables of the hash layers (int64), which are never cut."""
    hashed = sum(config.is_hash_layer(layer) for layer in layers)
    table = config.vocab_size * config.num_experts_per_tok * 8
    return hashed * table + (len(layers) - hashed) * config.n_routed_experts * _FP32
