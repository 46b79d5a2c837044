"""Key-value caches and generation: prefill with the packed forward, then one token per sequence and step.

What a layer must remember does not grow with the window: the last `sliding_window` keys, the compressed
entries, and for each compressor the tokens of the window still open plus, where windows overlap, those of the
window before. Prefill and decode give the logits of the full forward at any split point.

Shape letters: B sequences, W window, N entry capacity, m ratio, c head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fullweight.core.errors import ConfigError, DataError
from fullweight.core.types import CompressionTable, PackedLayout
from fullweight.models.deepseek_v4.compressor import Compressor, CompressorOutput
from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.context import Auxiliary
from fullweight.models.deepseek_v4.rotary import Rotation, frequencies, rotation

if TYPE_CHECKING:
    from fullweight.models.deepseek_v4.model import DeepSeekV4


class CompressorCache:
    """Entries made so far, the open window and the one before it, for B sequences."""

    def __init__(
        self,
        num_sequences: int,
        ratio: int,
        width: int,
        capacity: int,
        like: Tensor,
    ) -> None:
        self.ratio, self.overlap = ratio, ratio == CSA_RATIO
        channels = width * (2 if self.overlap else 1)
        self.entries = like.new_zeros(num_sequences, capacity // ratio, width)
        self.counts = torch.zeros(num_sequences, dtype=torch.int64, device=like.device)
        # [B, 2m, channels]: the window before, then the open one
        self.values = torch.zeros(num_sequences, 2 * ratio, channels, device=like.device)
        self.gates = torch.zeros_like(self.values)

    def fill(self, output: CompressorOutput, layout: PackedLayout) -> None:
        """Take over a packed prefill whose documents are the B sequences."""
        begin = layout.tables[self.ratio].entry_begin
        start = 0
        self.values, self.gates = self.values.to(output.values), self.gates.to(output.gates)
        for b, length in enumerate(layout.document_lengths[: layout.num_documents]):
            made, first = length // self.ratio, int(begin[start])
            self.entries[b, :made] = output.entries[first : first + made]
            self.counts[b] = made
            kept = min(length, length % self.ratio + self.ratio)
            at = self.ratio - (kept - length % self.ratio)
            for cache, source in ((self.values, output.values), (self.gates, output.gates)):
                cache[b, at : at + kept] = source[start + length - kept : start + length]
            start += length

    def append(self, compressor: Compressor, x: Tensor, context: DecodeContext) -> tuple[Tensor, Tensor]:
        """Add one token x [B, d] to each sequence; returns entries [B, N, c] and which exist [B, N]."""
        rows = torch.arange(x.shape[0], device=x.device)
        slot = self.ratio + context.positions % self.ratio
        values, gates = compressor.project(x)
        self.values[rows, slot], self.gates[rows, slot] = values, gates
        complete = slot == 2 * self.ratio - 1
        if bool(complete.any()):
            window_positions = context.positions - self.ratio + 1
            first = rows * 2 * self.ratio + self.ratio
            table = CompressionTable(self.ratio, first, window_positions, first, first)
            pooled = compressor.ops.compress(
                self.values.flatten(0, 1), self.gates.flatten(0, 1), compressor.ape, table, self.overlap
            )
            turned = rotation(window_positions, context.compress_frequency)
            made = compressor.finish(pooled, turned, x.dtype)
            self.entries[rows[complete], self.counts[complete]] = made[complete]
            self.counts += complete
            for cache in (self.values, self.gates):
                cache[complete, : self.ratio] = cache[complete, self.ratio :]
        place = torch.arange(self.entries.shape[1], device=x.device)
        return self.entries, place < self.counts.unsqueeze(1)


class LayerCache:
    """One layer's memory of B sequences."""

    def __init__(
        self, config: DeepSeekV4Config, layer: int, num_sequences: int, capacity: int, like: Tensor
    ) -> None:
        kind, ratio = config.layer_kind(layer), config.compress_ratios[layer]
        self.window = like.new_zeros(num_sequences, config.sliding_window, config.head_dim)
        if kind is not LayerKind.SLIDING:
            self.main = CompressorCache(num_sequences, ratio, config.head_dim, capacity, like)
        if kind is LayerKind.CSA:
            self.index = CompressorCache(num_sequences, ratio, config.index_head_dim, capacity, like)

    def fill_window(self, kv: Tensor, layout: PackedLayout) -> None:
        """Keep the last W keys of each document, each at slot position % W."""
        size = self.window.shape[1]
        end = 0
        for b, length in enumerate(layout.document_lengths[: layout.num_documents]):
            end += length
            kept = min(length, size)
            slots = torch.arange(length - kept, length, device=kv.device) % size
            self.window[b, slots] = kv[end - kept : end]

    def append_window(self, kv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Add kv [B, c]; returns keys [B, W, c] and which hold a token [B, W]."""
        size = self.window.shape[1]
        self.window[torch.arange(kv.shape[0], device=kv.device), positions % size] = kv
        return self.window, torch.arange(size, device=kv.device) <= positions.unsqueeze(1)

    def select(self, queries: Tensor, weights: Tensor, keys: Tensor, seen: Tensor, topk: int) -> Tensor:
        """Which entries [B, N] the indexer picks among those `seen`; ties to the lower index."""
        products = torch.relu(torch.einsum("bhc,bsc->bhs", queries, keys)).to(weights.dtype)
        scores = torch.einsum("bh,bhs->bs", weights, products).masked_fill(~seen, float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        return torch.zeros_like(seen).scatter(1, best, True) & seen


@dataclass
class DecodeContext:
    """What the layers share while every sequence takes one step."""

    tokens: Tensor  # [B]
    positions: Tensor  # [B]
    main: Rotation
    compress: Rotation
    compress_frequency: Tensor
    layers: list[LayerCache]
    aux: Auxiliary = field(default_factory=Auxiliary)
    with_losses: bool = False


class Cache:
    """All layers' caches of B sequences and how long each sequence is; `like` gives dtype and device."""

    def __init__(self, config: DeepSeekV4Config, num_sequences: int, capacity: int, like: Tensor) -> None:
        self.config, self.capacity = config, capacity
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=like.device)
        self.layers = [
            LayerCache(config, layer, num_sequences, capacity, like) for layer in range(config.num_hidden_layers)
        ]

    def step(self, tokens: Tensor) -> DecodeContext:
        """Context of one new token per sequence; the lengths grow by one."""
        if int(self.lengths.max()) >= self.capacity:
            raise DataError(f"the cache holds {self.capacity} tokens a sequence and is full")
        main = frequencies(self.config, compressed=False, device=tokens.device)
        compress = frequencies(self.config, compressed=True, device=tokens.device)
        positions = self.lengths.clone()
        self.lengths += 1
        turned = rotation(positions, main), rotation(positions, compress)
        return DecodeContext(tokens, positions, *turned, compress, self.layers)


@torch.no_grad()
def generate(
    model: DeepSeekV4,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt (token ids) by at most `max_new_tokens`; a stop id ends one and is included.

    temperature 0 takes the likeliest token; otherwise tokens are drawn, from the smallest set of tokens
    that holds probability `top_p`. Raises DataError on an empty prompt, ConfigError on a setting out of range.
    """
    if not temperature >= 0 or not 0 < top_p <= 1:  # NaN is refused too
        raise ConfigError(
            f"temperature {temperature} and top_p {top_p}: use a temperature of at least 0 and top_p in (0, 1]"
        )
    if not prompts or any(len(p) == 0 for p in prompts):
        raise DataError("a prompt is empty: give at least one token to continue")
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    generator = torch.Generator().manual_seed(seed)
    capacity = max(len(p) for p in prompts) + max_new_tokens
    logits, cache = model.prefill(prompts, capacity)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool)
    stops = set(stop_ids)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature, top_p, generator)
        for b in torch.nonzero(running).flatten().tolist():
            outputs[b].append(int(tokens[b]))
            running[b] = int(tokens[b]) not in stops
        if step + 1 == max_new_tokens or not bool(running.any()):
            break
        logits = model.decode(tokens, cache)
    return outputs


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits [B, V]."""
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ordered = probabilities.sort(-1, descending=True)
        before = ordered.values.cumsum(-1) - ordered.values
        kept = ordered.values.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, ordered.indices, kept)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(-1).to(logits.device)
