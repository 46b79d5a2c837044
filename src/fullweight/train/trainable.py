"""Which parameters train: all of them, or those that a recipe names.

`train.trainable` minus `train.frozen`, both lists of shell patterns (`fnmatch`, case-sensitive) on the published
parameter names, such as `*.indexer.*` or `layers.0.*`. A frozen parameter has no gradient, no moments and no
decay, and comes back bit for bit in the export. A router's bias is no optimiser's parameter, but it is learnt by
a rule, so the same patterns decide whether the rule moves it.

Experts of a layer are one stacked tensor here: a pattern takes all of them or none. The ledger's names of stacked
tensors work too. Left out: learning rates by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import filter as matching

import torch
from torch import nn

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.block import Block
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import stacks
from fullweight.models.deepseek_v4.indexer import Indexer
from fullweight.models.deepseek_v4.model import DeepSeekV4, parameters_of

ALL = ("*",)
_BIAS = ".ffn.gate.bias"


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, and how many of them the optimisers own; router biases are in neither."""

    total: int
    trained: int

    @property
    def all_trained(self) -> bool:
        return self.trained == self.total

    def __str__(self) -> str:
        if self.all_trained:
            return f"{self.total:,} parameters, all trained"
        return f"{self.total:,} parameters, {self.trained:,} trained, {self.total - self.trained:,} frozen"

    @staticmethod
    def of(model: nn.Module) -> ParameterCount:
        facts = parameters_of(model).values()
        return ParameterCount(sum(p.size for p in facts), sum(p.size for p in facts if p.trains))


def select(architecture: DeepSeekV4Config, trainable: Sequence[str], frozen: Sequence[str]) -> frozenset[str]:
    """Our names of the parameters and router biases that train. Reads sizes only.

    Raises ConfigError for a pattern that matches nothing, with the nearest names, or that cuts a stacked tensor,
    and when no parameter is left to train.
    """
    with torch.device("meta"):
        model = DeepSeekV4(architecture, ops="reference")
    names = _published(model)
    chosen = _matched(names, trainable, "train.trainable") - _matched(names, frozen, "train.frozen")
    if all(name.endswith(_BIAS) for name in chosen):
        raise ConfigError(
            f"train.trainable ({_listed(trainable)}) without train.frozen ({_listed(frozen)}) leaves no parameter "
            "to train; name at least one"
        )
    return frozenset(chosen)


def freeze(model: DeepSeekV4, chosen: Iterable[str]) -> None:
    """Let only the parameters and router biases in `chosen` (of `select`) train. Call it before sharding."""
    chosen = frozenset(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    for name, module in model.named_modules():
        if name.endswith(".ffn.gate"):
            module.bias_trains = f"{name}.bias" in chosen


def sharding_units(model: DeepSeekV4) -> list[nn.Module]:
    """What is sharded as one unit each: the blocks, and some indexers inside of them, which come first.

    FSDP gathers a unit again for the backward pass when a gradient reaches its output. An indexer's loss goes
    past its block's output, so an indexer that trains where the streams carry no gradient is a unit of its own.
    """
    units: list[nn.Module] = []
    carries = model.embed.weight.requires_grad
    for block in model.layers:
        assert isinstance(block, Block)
        carries = carries or any(p.requires_grad for p in block.carriers())
        if not carries:
            indexers = [m for m in block.modules() if isinstance(m, Indexer)]
            units += [m for m in indexers if any(p.requires_grad for p in m.parameters())]
    return [*units, *model.layers, *model.mtp]


def _published(model: DeepSeekV4) -> dict[str, tuple[str, ...]]:
    """Published names of the parts of each parameter and router bias, by our name."""
    parts = {stack.ours: tuple(stack.names()) for stack in stacks(model.config)}
    biases = [name for name, _ in model.named_buffers() if name.endswith(_BIAS)]
    return {name: parts.get(name, (name,)) for name in [*(n for n, _ in model.named_parameters()), *biases]}


def _matched(names: Mapping[str, tuple[str, ...]], patterns: Sequence[str], key: str) -> set[str]:
    if tuple(patterns) == ALL:
        return set(names)
    owner = {part: ours for ours, parts in names.items() for part in parts}
    parts_found: set[str] = set()
    for pattern in patterns:
        found = matching(owner, pattern)
        found += [part for ours in matching(names, pattern) for part in names[ours]]
        if not found:
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter; nearest: {', '.join(_nearest(pattern, names))} "
                "(shell patterns on whole published names; * also matches dots)"
            )
        parts_found.update(found)
    chosen = {owner[part] for part in parts_found}
    for ours in chosen:
        some = parts_found.intersection(names[ours])
        if len(some) < len(names[ours]):
            raise ConfigError(
                f"{key} ({_listed(patterns)}) names {len(some)} of the {len(names[ours])} matrices that train as "
                f"one tensor, such as {min(some)}; name them all: {ours.rpartition('.')[0]}.*"
            )
    return chosen


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The three kinds of name (layers as *) whose parts are most like those of the pattern."""
    words = [word for word in re.split(r"[.*?\[\]]+", pattern) if word] or [pattern]
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)

    def likeness(kind: str) -> float:
        return sum(max(SequenceMatcher(None, word, part).ratio() for part in kind.split(".")) for word in words)

    return sorted(kinds, key=likeness, reverse=True)[:3]


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "none"
