"""Every tensor of a published DeepSeek-V4 checkpoint, from its config alone: names, shapes, dtypes, shards, bytes.

A *published tensor* is what a checkpoint means (`layers.0.attn.wq_a.weight`, [q_lora_rank, d]); a *stored
tensor* is what a file holds. A quantised matrix is stored as two: `X.weight` (codes) and `X.scale`. A `Layout`
says how matrices are stored; the released one packs experts as FP4 and the other matrices as FP8. The counts and
bytes of the four releases follow from the config; nothing here is a table of totals. Imports no torch.

Left out: V4.1, whose architecture is another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config, LayerKind

FP4_COLUMNS = 32
"""Columns of a row that share one FP4 scale."""
FP8_BLOCK = 128
"""Rows and columns of the block that shares one FP8 scale."""
INDEX = "model.safetensors.index.json"


class Kind(StrEnum):
    """What a published tensor is, which decides how a layout stores it."""

    EXPERT = "expert"  # a routed expert's matrix
    MATRIX = "matrix"  # any other matrix that the release quantises
    PLAIN = "plain"  # bf16 in the release: embeddings, norms, compressors, routers
    WIDE = "wide"  # fp32 in every layout: hyper-connections, sinks, position and router biases
    TABLE = "table"  # int64 hash tables


@dataclass(frozen=True)
class PublishedTensor:
    """One tensor that a checkpoint of the config must hold; `shard` is 1-based."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    shard: int


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores matrices; dtypes by their safetensors names, "FP4" for packed e2m1."""

    name: str
    expert: str
    matrix: str
    plain: str = "BF16"
    scale: str = "F8_E8M0"

    def stored_as(self, kind: Kind) -> str:
        """Storage of a kind: "FP4", "F8_E4M3", "BF16", "F32" or "I64"."""
        fixed = {Kind.WIDE: "F32", Kind.TABLE: "I64"}
        return fixed.get(kind) or {Kind.EXPERT: self.expert, Kind.MATRIX: self.matrix}.get(kind, self.plain)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fp4", expert="FP4", matrix="F8_E4M3"),  # Flash, Pro and their successors
        Layout("fp8", expert="F8_E4M3", matrix="F8_E4M3"),
        Layout("base", expert="F8_E4M3", matrix="F8_E4M3", scale="F32"),  # Flash-Base, Pro-Base
        Layout("bfloat16", expert="BF16", matrix="BF16"),
        Layout("float32", expert="F32", matrix="F32", plain="F32"),
    )
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: `dtype` is the safetensors name; `published` the tensor that it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    published: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


ITEM_BYTES = {
    "I64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
}


def is_dspark(config: DeepSeekV4Config) -> bool:
    """Whether config.json says that the `mtp.*` tensors are DSpark's draft blocks, not the MTP block."""
    return "dspark_block_size" in config.extra and config.num_nextn_predict_layers == 0


def published_tensors(config: DeepSeekV4Config) -> list[PublishedTensor]:
    """The tensors that a model of this config is made of (MTP included), in the release's order of shards."""
    d, layers = config.hidden_size, config.num_hidden_layers
    found = [PublishedTensor("embed.weight", (config.vocab_size, d), Kind.PLAIN, 1)]
    for layer in range(layers):
        found += _block(config, f"layers.{layer}", layer, 2 + layer)
    found.append(PublishedTensor("head.weight", (config.vocab_size, d), Kind.PLAIN, layers + 2))
    found += _norms("norm", shape=(d,), shard=layers + 2) + _hyper_head(config, "", layers + 2)
    for stage in range(config.num_nextn_predict_layers):
        prefix, shard = f"mtp.{stage}", layers + 3 + stage
        found += _block(config, prefix, layers, shard)
        for name in ("e_proj", "h_proj"):
            found.append(PublishedTensor(f"{prefix}.{name}.weight", (d, d), Kind.MATRIX, shard))
        found += _norms(*(f"{prefix}.{n}" for n in ("enorm", "hnorm", "norm")), shape=(d,), shard=shard)
        found += _hyper_head(config, f"{prefix}.", shard)
    return found


def draft_tensors(config: DeepSeekV4Config) -> list[PublishedTensor]:
    """The DSpark draft blocks of a checkpoint whose config announces them; empty otherwise.

    As many stages as `compress_ratios` has entries past the layers, each a sliding-window block; the first
    reads the concatenated states of `dspark_target_layer_ids`, the last ends in norm, hyper-connection head,
    Markov head and confidence head.
    """
    if not is_dspark(config):
        return []
    layers, d, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    stages = len(config.compress_ratios) - layers
    try:
        rank, sources = int(config.extra["dspark_markov_rank"]), len(config.extra["dspark_target_layer_ids"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            "config.json has dspark_block_size but not both dspark_markov_rank (a number) and "
            "dspark_target_layer_ids (a list); the shapes of its draft blocks cannot be known"
        ) from None
    if stages < 1:
        raise CheckpointError("config.json announces DSpark but compress_ratios has no entry for a draft block")
    found = []
    for stage in range(stages):
        found += _block(config, f"mtp.{stage}", layers + stage, layers + 3 + stage)
    first, last, shard = "mtp.0", f"mtp.{stages - 1}", layers + 2 + stages
    found.append(PublishedTensor(f"{first}.main_proj.weight", (d, sources * d), Kind.MATRIX, layers + 3))
    found += _norms(f"{first}.main_norm", shape=(d,), shard=layers + 3) + _norms(
        f"{last}.norm", shape=(d,), shard=shard
    )
    found += _hyper_head(config, f"{last}.", shard)
    for name in ("markov_w1", "markov_w2"):
        found.append(PublishedTensor(f"{last}.markov_head.{name}.weight", (vocab, rank), Kind.PLAIN, shard))
    found.append(PublishedTensor(f"{last}.confidence_head.proj.weight", (1, d + rank), Kind.PLAIN, shard))
    return found


def stored_tensors(tensors: list[PublishedTensor], layout: Layout) -> Iterator[StoredTensor]:
    """What the files of a layout hold for these tensors, codes before scales."""
    for tensor in tensors:
        yield from stored_parts(tensor, layout.stored_as(tensor.kind), layout.scale)


def stored_parts(tensor: PublishedTensor, storage: str, scale: str = "F8_E8M0") -> Iterator[StoredTensor]:
    """The one or two stored tensors of a published one; raises CheckpointError if it cannot be packed."""

    def part(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(name, dtype, shape, tensor.shard, tensor.name)

    if storage == "FP4":
        yield part(tensor.name, "I8", packed_shape(tensor.name, tensor.shape))
        yield part(scale_name(tensor.name), "F8_E8M0", fp4_scale_shape(tensor.shape))
    elif storage == "F8_E4M3":
        yield part(tensor.name, "F8_E4M3", tensor.shape)
        yield part(scale_name(tensor.name), scale, fp8_scale_shape(tensor.shape))
    else:
        yield part(tensor.name, storage, tensor.shape)


def packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns / 2]: two FP4 codes a byte."""
    rows, columns = shape
    if columns % 2:
        raise CheckpointError(f"{name} has {columns} columns; FP4 packs two a byte, so it needs an even number")
    return rows, columns // 2


def fp4_scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, ceil(columns / 32)]."""
    return shape[0], -(-shape[1] // FP4_COLUMNS)


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[ceil(rows / 128), ceil(columns / 128)]."""
    return -(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK)


def scale_name(weight: str) -> str:
    """`X.scale` of `X.weight`."""
    return weight.removesuffix("weight") + "scale"


def num_shards(config: DeepSeekV4Config) -> int:
    """Files of a release: embedding, one a layer, head, one a MTP or draft block."""
    last = len(config.compress_ratios) if is_dspark(config) else None
    blocks = config.num_nextn_predict_layers if last is None else last - config.num_hidden_layers
    return config.num_hidden_layers + 2 + blocks


def shard_file(shard: int, count: int) -> str:
    return f"model-{shard:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Totals:
    """Stored tensors of a checkpoint and the bytes of their data (headers not counted)."""

    tensors: int
    payload_bytes: int


def totals(config: DeepSeekV4Config, layout: Layout = LAYOUTS["fp4"]) -> Totals:
    """Count and payload of a checkpoint of this config, draft blocks included; nothing is materialised.

    >>> totals(DeepSeekV4Config.preset("flash"))
    Totals(tensors=69187, payload_bytes=159609485896)
    """
    stored = list(stored_tensors([*published_tensors(config), *draft_tensors(config)], layout))
    return Totals(len(stored), sum(tensor.num_bytes for tensor in stored))


def _norms(*names: str, shape: tuple[int, ...], shard: int) -> list[PublishedTensor]:
    return [PublishedTensor(f"{name}.weight", shape, Kind.PLAIN, shard) for name in names]


def _hyper_head(config: DeepSeekV4Config, prefix: str, shard: int) -> list[PublishedTensor]:
    n, d = config.hc_mult, config.hidden_size
    shapes = {"fn": (n, n * d), "base": (n,), "scale": (1,)}
    return [PublishedTensor(f"{prefix}hc_head_{k}", s, Kind.WIDE, shard) for k, s in shapes.items()]


def _block(config: DeepSeekV4Config, prefix: str, layer: int, shard: int) -> list[PublishedTensor]:
    d, n = config.hidden_size, config.hc_mult
    found = _norms(f"{prefix}.attn_norm", f"{prefix}.ffn_norm", shape=(d,), shard=shard)
    for part in ("attn", "ffn"):
        mixes = (2 + n) * n
        shapes = {"fn": (mixes, n * d), "base": (mixes,), "scale": (3,)}
        found += [PublishedTensor(f"{prefix}.hc_{part}_{k}", s, Kind.WIDE, shard) for k, s in shapes.items()]
    return found + _attention(config, f"{prefix}.attn", layer, shard) + _moe(config, prefix, layer, shard)


def _attention(config: DeepSeekV4Config, prefix: str, layer: int, shard: int) -> list[PublishedTensor]:
    d, c, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    groups, low = config.o_groups, config.o_lora_rank
    found = [PublishedTensor(f"{prefix}.attn_sink", (heads,), Kind.WIDE, shard)]
    found += _norms(f"{prefix}.q_norm", shape=(rank,), shard=shard)
    found += _norms(f"{prefix}.kv_norm", shape=(c,), shard=shard)
    matrices = {
        "wq_a": (rank, d),
        "wq_b": (heads * c, rank),
        "wkv": (c, d),
        "wo_a": (groups * low, heads * c // groups),
        "wo_b": (d, groups * low),
    }
    found += [PublishedTensor(f"{prefix}.{k}.weight", s, Kind.MATRIX, shard) for k, s in matrices.items()]
    kind = config.layer_kind(layer)
    if kind is not LayerKind.SLIDING:
        found += _compressor(config, f"{prefix}.compressor", config.compress_ratios[layer], c, shard)
    if kind is LayerKind.CSA:
        width, queries = config.index_head_dim, config.index_n_heads
        found += _compressor(config, f"{prefix}.indexer.compressor", CSA_RATIO, width, shard)
        found += [
            PublishedTensor(f"{prefix}.indexer.wq_b.weight", (queries * width, rank), Kind.MATRIX, shard),
            PublishedTensor(f"{prefix}.indexer.weights_proj.weight", (queries, d), Kind.PLAIN, shard),
        ]
    return found


def _compressor(
    config: DeepSeekV4Config, prefix: str, ratio: int, width: int, shard: int
) -> list[PublishedTensor]:
    channels = width * (2 if ratio == CSA_RATIO else 1)
    matrix = (channels, config.hidden_size)
    return [
        PublishedTensor(f"{prefix}.wkv.weight", matrix, Kind.PLAIN, shard),
        PublishedTensor(f"{prefix}.wgate.weight", matrix, Kind.PLAIN, shard),
        PublishedTensor(f"{prefix}.ape", (ratio, channels), Kind.WIDE, shard),
        PublishedTensor(f"{prefix}.norm.weight", (width,), Kind.PLAIN, shard),
    ]


def _moe(config: DeepSeekV4Config, prefix: str, layer: int, shard: int) -> list[PublishedTensor]:
    d, f, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    gate = f"{prefix}.ffn.gate"
    found = [PublishedTensor(f"{gate}.weight", (experts, d), Kind.PLAIN, shard)]
    if config.is_hash_layer(layer):
        table = (config.vocab_size, config.num_experts_per_tok)
        found.append(PublishedTensor(f"{gate}.tid2eid", table, Kind.TABLE, shard))
    else:
        found.append(PublishedTensor(f"{gate}.bias", (experts,), Kind.WIDE, shard))
    for index in [*map(str, range(experts)), None]:
        holder = f"{prefix}.ffn.shared_experts" if index is None else f"{prefix}.ffn.experts.{index}"
        kind = Kind.MATRIX if index is None else Kind.EXPERT
        for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
            found.append(PublishedTensor(f"{holder}.{name}.weight", shape, kind, shard))
    return found
