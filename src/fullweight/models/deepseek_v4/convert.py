"""Our tensors to the published names and back: one list of invertible operations, played both ways.

Ours are the published names already, except that experts are stacked: `experts.gate_up` [X, 2f, d] holds every
expert's w1 (gate) then w3 (up) rows, `experts.down` [X, d, f] their w2; the shared expert likewise without X.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

# copies of the embedding and head that released checkpoints may carry inside the MTP block
_IGNORED = re.compile(r"^mtp\.\d+\.(emb.*|head\.weight)$")


def is_copy(name: str) -> bool:
    """Whether a published tensor is such a copy: shared weights, which import ignores."""
    return _IGNORED.match(name) is not None


@dataclass(frozen=True)
class Part:
    """Where a published tensor lies in one of ours: index of the expert dim (None: ours has none), first row."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    row: int = 0


@dataclass(frozen=True)
class Stack:
    """`ours` is the published `parts` stacked: rows of parts joined, experts along a new first dim."""

    ours: str
    parts: tuple[str, ...]
    part_shape: tuple[int, int]
    num_experts: int | None  # None: a single expert, no leading dim

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        experts = tensor.unbind(0) if self.num_experts is not None else (tensor,)
        for index, expert in enumerate(experts):
            for name, rows in zip(self.parts, expert.chunk(len(self.parts), 0), strict=True):
                yield name.format(expert=index), rows

    def names(self) -> Iterator[str]:
        for index in range(self.num_experts or 1):
            for name in self.parts:
                yield name.format(expert=index)

    def places(self) -> list[Part]:
        """Where each published part lies in ours; their order is that of our rows."""
        rows = self.part_shape[0]
        experts = [None] if self.num_experts is None else range(self.num_experts)
        return [
            Part(name.format(expert=expert), self.part_shape, expert, i * rows)
            for expert in experts
            for i, name in enumerate(self.parts)
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ours."""
        rows, columns = self.part_shape
        matrix = (rows * len(self.parts), columns)
        return matrix if self.num_experts is None else (self.num_experts, *matrix)

    def join(self, published: Mapping[str, Tensor]) -> Tensor:
        """Raises CheckpointError naming the first part that is missing or misshapen."""
        names = list(self.names())
        missing = [name for name in names if name not in published]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} parts of {self.ours})")
        tensors = [published[name] for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape != self.part_shape:
                found, expected = list(tensor.shape), list(self.part_shape)
                raise CheckpointError(f"{name} has shape {found}, expected {expected}")
        count = len(self.parts)
        experts = [torch.cat(tensors[i : i + count], 0) for i in range(0, len(tensors), count)]
        return torch.stack(experts) if self.num_experts is not None else experts[0]


def stacks(config: DeepSeekV4Config) -> list[Stack]:
    """The operations of a model: everything not named here keeps its name and shape."""
    blocks = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    blocks += [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]
    d, f = config.hidden_size, config.moe_intermediate_size
    up, down = (f, d), (d, f)
    result = []
    for block in blocks:
        routed, shared = f"{block}.ffn.experts", f"{block}.ffn.shared_experts"
        one = routed + ".{expert}"
        count = config.n_routed_experts
        result.append(Stack(f"{routed}.gate_up", (f"{one}.w1.weight", f"{one}.w3.weight"), up, count))
        result.append(Stack(f"{routed}.down", (f"{one}.w2.weight",), down, count))
        result.append(Stack(f"{shared}.gate_up", (f"{shared}.w1.weight", f"{shared}.w3.weight"), up, None))
        result.append(Stack(f"{shared}.down", (f"{shared}.w2.weight",), down, None))
    return result


def to_published(tensors: Mapping[str, Tensor], config: DeepSeekV4Config) -> dict[str, Tensor]:
    """Our named tensors under the published names (views where possible)."""
    stacked = {stack.ours: stack for stack in stacks(config)}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in stacked:
            result.update(stacked[name].split(tensor))
        else:
            result[name] = tensor
    return result


def from_published(tensors: Mapping[str, Tensor], config: DeepSeekV4Config) -> dict[str, Tensor]:
    """Published tensors under our names; raises CheckpointError naming a missing or misshapen part."""
    remaining = {name: t for name, t in tensors.items() if not is_copy(name)}
    result: dict[str, Tensor] = {}
    for stack in stacks(config):
        result[stack.ours] = stack.join(remaining)
        for name in stack.names():
            del remaining[name]
    return {**remaining, **result}


# ---- transformers' own names ------------------------------------------------------------------------------

# Applied in turn to a name outside the experts; transformers 5.23, conversion_mapping.py, key "deepseek_v4".
_TO_TRANSFORMERS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embed\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^norm\.", "model.norm."),
        (r"^hc_head_", "model.hc_head.hc_"),
        (r"^layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"^layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"^layers\.(\d+)\.hc_(attn|ffn)_", r"model.layers.\1.\2_hc."),
        (r"^layers\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
        (r"^layers\.(\d+)\.ffn\.", r"model.layers.\1.mlp."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
        (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
        (r"\.(compressor|compressor\.indexer)\.norm\.", r".\1.kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.attn_sink$", ".sinks"),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_a\.", ".o_a_proj."),
        (r"\.wo_b\.", ".o_b_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    )
]


def transformers_name(published: str) -> str | None:
    """The name that transformers' own checkpoints give a published tensor; None for MTP, which it lacks.

    A routed expert's matrix gets the name of the stack that holds it: `mlp.experts.gate_up_proj` [X, 2f, d] or
    `mlp.experts.down_proj` [X, d, f], in the order of `Stack.places`.
    """
    if published.startswith("mtp."):
        return None
    expert = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.\d+\.w(\d)\.weight", published)
    if expert is not None:
        kind = "down_proj" if expert[2] == "2" else "gate_up_proj"
        return f"model.layers.{expert[1]}.mlp.experts.{kind}"
    for pattern, replacement in _TO_TRANSFORMERS:
        published = pattern.sub(replacement, published)
    return published
