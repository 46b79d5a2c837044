"""Small random configurations, weights and documents that put every part of the model to work.

Weights are drawn so that no part is idle: norms differ from one, sinks, position and router biases from zero,
hyper-connection scales are about one, hash tables are random. Documents are drawn again until no choice of
experts or entries is so close that rounding decides it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullweight.core.types import Batch, CompressionTable, PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.moe import Gate
from fullweight.ops.reference import ReferenceOperations

# Smallest relative gap between a chosen and a rejected expert or entry that a comparison in fp32 may rest on:
# several times the rounding of the scores (about 1e-6), so both sides choose alike on any machine.
SMALLEST_GAP = 1e-5


@dataclass(frozen=True, eq=False)
class Case:
    """A small architecture and the lengths of the documents of one pack."""

    number: int
    config: DeepSeekV4Config
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        kinds = "-".join({0: "swa", 4: "csa", 128: "hca"}[r] for r in self.config.compress_ratios[:-1])
        hashed = min(self.config.num_hash_layers, self.config.num_hidden_layers)
        return f"{self.number:02d}-{kinds}-hash{hashed}-g{self.config.o_groups}-n{self.config.hc_mult}"


def _draw_int(generator: torch.Generator, choices: Sequence[int]) -> int:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


# layers, hash layers, lengths: each kind alone, then mixes; every length that sits on a boundary.
_PLANS: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = [
    ((0,), 0, (1, 3, 4, 5, 40)),
    ((0,), 1, (17, 64)),
    ((4,), 0, (1, 3, 4, 5, 127)),
    ((4,), 1, (257,)),
    ((128,), 0, (127, 128, 129)),
    ((128,), 1, (1, 257, 3)),
    ((0, 0), 1, tuple(range(1, 21))),
    ((4, 4), 1, (9, 128, 33)),
    ((128, 128), 0, (129, 130)),
    ((0, 4), 2, (4, 5, 7, 8, 9)),
    ((0, 128), 1, (5, 128, 60)),
    ((4, 128), 0, (400,)),
    ((128, 4), 1, (129, 3, 127)),
    ((4, 0), 0, (50, 1, 1, 49)),
    ((0, 4, 128), 1, (257, 20)),
    ((128, 128, 4), 3, (128, 5, 129)),
    ((4, 128, 4), 0, (64, 63, 65)),
    ((0, 0, 4), 2, (100,)),
    ((128, 0, 4), 1, (4, 127, 128, 129)),
    ((4, 128, 0), 2, (300,)),
    ((0, 4, 128), 0, (12, 7, 3, 1, 30, 5, 4, 9, 2, 16, 140, 6)),
    ((0, 4, 128, 4), 1, (131, 70)),
    ((128, 128, 4, 128), 3, (256, 3)),
    ((4, 4, 128, 128), 4, (128, 128)),
    ((0, 128, 4, 0), 0, (5, 4, 3, 1, 257)),
    ((0, 0, 4, 128), 2, (23, 1, 8, 31, 3, 4, 15, 16, 17, 2, 5, 6, 7, 40, 11, 12, 13, 14, 9, 10)),
    ((4, 128, 4, 128), 1, (127, 129)),
    ((0, 4, 128, 4), 2, (400, 1)),
]


# with every kind of layer among them, and several documents each
BF16_CASES = (10, 14, 21, 25, 27)


@functools.cache
def cases() -> tuple[Case, ...]:
    """The random configurations, the same ones everywhere."""
    return tuple(_make_case(number, *plan) for number, plan in enumerate(_PLANS))


def _make_case(number: int, ratios: tuple[int, ...], num_hash: int, lengths: tuple[int, ...]) -> Case:
    generator = torch.Generator().manual_seed(1000 + number)
    draw = functools.partial(_draw_int, generator)
    groups = (1, 2, 4, 8)[number % 4]
    head_dim, rope = ((16, 8), (32, 8), (32, 16), (48, 24), (64, 64))[draw(range(5))]
    experts = draw((4, 6, 8))
    config = DeepSeekV4Config(
        vocab_size=draw((61, 97, 128)),
        hidden_size=draw((32, 40, 64)),
        num_hidden_layers=len(ratios),
        num_attention_heads=groups * (draw((1, 2)) if groups > 2 else draw((2, 4))),
        head_dim=head_dim,
        qk_rope_head_dim=rope,
        q_lora_rank=draw((16, 24, 32)),
        o_groups=groups,
        o_lora_rank=draw((8, 12)),
        sliding_window=draw((1, 4, 7, 16, 64)),
        compress_ratios=(*ratios, 0),
        index_n_heads=draw((32, 40)),
        index_head_dim=max(rope, draw((16, 24))),
        index_topk=draw((2, 5, 8, 16)),
        n_routed_experts=experts,
        num_experts_per_tok=draw((2, 3)),
        moe_intermediate_size=draw((16, 24)),
        num_hash_layers=num_hash,
        routed_scaling_factor=(1.0, 1.5, 2.5)[draw(range(3))],
        swiglu_limit=(0.5, 2.0, 10.0)[draw(range(3))],
        hc_mult=(4, 2, 4, 3)[number % 4],
        hc_sinkhorn_iters=draw((3, 20)),
        hc_eps=(1e-6, 1e-4)[draw(range(2))],
        rms_norm_eps=(1e-6, 1e-5)[draw(range(2))],
        rope_theta=(10000.0, 500.0)[draw(range(2))],
        compress_rope_theta=(160000.0, 2000.0)[draw(range(2))],
        rope_scaling={
            "factor": float(draw((4, 16))),
            "original_max_position_embeddings": draw((32, 64, 256)),
            "beta_fast": float(draw((4, 32))),
        },
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    return Case(number, config, lengths)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights that leave no part idle; activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * normal
        elif name.endswith("_scale"):
            value = 1 + 0.2 * normal
        elif name.endswith(("_base", "ape")):
            value = 0.5 * normal
        elif name.endswith("attn_sink") or name == "embed.weight":
            value = normal
        else:
            value = normal * parameter.shape[-1] ** -0.5
        parameter.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            experts = int(model.config.n_routed_experts)
            rows = torch.rand(buffer.shape[0], experts, generator=generator).argsort(-1)
            buffer.copy_(rows[:, : buffer.shape[1]])
        else:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


class _Watching(ReferenceOperations):
    """Reference operations that note how close each choice of entries was."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    def select_entries(
        self, queries: Tensor, keys: Tensor, weights: Tensor, table: CompressionTable, topk: int
    ) -> Tensor:
        scores = self.index_scores(queries, keys, weights)
        entry = torch.arange(keys.shape[0])
        hidden = (entry < table.entry_begin[:, None]) | (entry >= table.entry_end[:, None])
        ordered = scores.masked_fill(hidden, float("-inf")).sort(-1, descending=True).values
        if ordered.shape[1] > topk:
            gap = (ordered[:, topk - 1] - ordered[:, topk]) / scores.abs().amax(-1)
            self.gaps.append(_least(gap, ordered[:, topk]))
        return super().select_entries(queries, keys, weights, table, topk)


def _least(gap: Tensor, runner_up: Tensor) -> float:
    real = gap[runner_up.isfinite()]
    return float(real.min()) if real.numel() else math.inf


def smallest_gap(model: DeepSeekV4, documents: list[list[int]]) -> float:
    """The closest choice of experts or entries that the model makes on these documents, relative."""
    watching = _Watching()
    watched = DeepSeekV4(model.config, ops=watching)
    watched.load_state_dict(model.state_dict())
    gaps = watching.gaps

    def note(gate: Gate, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        k = gate.config.num_experts_per_tok
        if not gate.hashed and k < gate.config.n_routed_experts:
            # the router's choice, and the balance loss's, which knows no bias
            for affinity in (outputs[0] + gate.get_buffer("bias"), outputs[0]):
                ordered = affinity.sort(-1, descending=True).values
                gaps.append(float((ordered[:, k - 1] - ordered[:, k]).min()))

    for module in watched.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(note)
    watched.logits(documents)
    return min(gaps, default=math.inf)


def draw_documents(model: DeepSeekV4, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random documents on which every discrete choice is clear (see SMALLEST_GAP)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        documents = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        if smallest_gap(model, documents) > SMALLEST_GAP:
            return documents
    raise AssertionError("no documents without a near tie in 50 draws")


def make_batch(
    documents: Sequence[Sequence[int]],
    config: DeepSeekV4Config,
    num_tokens: int | None = None,
    masks: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Pack documents; all tokens are trained unless `masks` says otherwise."""
    layout = PackedLayout.build([len(d) for d in documents], config.ratios, num_tokens)
    tokens = torch.zeros(layout.num_tokens, dtype=torch.int64)
    mask = torch.zeros(layout.num_tokens)
    flat = torch.tensor([t for d in documents for t in d])
    tokens[: len(flat)] = flat
    mask[: len(flat)] = 1.0 if masks is None else torch.tensor([m for d in masks for m in d])
    return Batch(tokens, mask, layout)
