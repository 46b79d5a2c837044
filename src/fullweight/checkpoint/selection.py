"""Which parameters a recipe trains: all of them, or those that it names.

`train.trainable` minus `train.frozen`, both lists of shell patterns (`fnmatch`, case-sensitive) on the published
parameter names, such as `*.indexer.*` or `layers.0.*`; router biases, which a rule moves, are among the names.
Everything follows from the config, so that who has only a run's record can tell what trained and count it.

Experts of a layer are one stacked tensor of ours: a pattern takes all of them or none. The ledger's names of
stacked tensors work too. Left out: how a model is told (`train/trainable.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import filter as matching

from fullweight.checkpoint.published import published_tensors
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import stacks

ALL = ("*",)
_BIAS = ".ffn.gate.bias"
_TABLE = ".ffn.gate.tid2eid"
_INDEXER = ".indexer."


@dataclass(frozen=True)
class Trained:
    """What a recipe trains: elements of parameters, whether those are all, and whether an indexer is there."""

    elements: int
    everything: bool
    indexers: bool


def trained(architecture: DeepSeekV4Config, trainable: Sequence[str], frozen: Sequence[str]) -> Trained:
    """Count what `select` chooses; raises ConfigError as it does."""
    total = architecture.num_parameters(mtp=True)
    if tuple(trainable) == ALL and not frozen:
        return Trained(total, True, True)
    chosen = select(architecture, trainable, frozen)
    owner = {part: stack.ours for stack in stacks(architecture) for part in stack.names()}
    elements = sum(
        math.prod(tensor.shape)
        for tensor in published_tensors(architecture)
        if owner.get(tensor.name, tensor.name) in chosen and not tensor.name.endswith(_BIAS)
    )
    return Trained(elements, elements == total, any(_INDEXER in name for name in chosen))


def select(architecture: DeepSeekV4Config, trainable: Sequence[str], frozen: Sequence[str]) -> frozenset[str]:
    """Our names of the parameters and router biases that train.

    Raises ConfigError for a pattern that matches nothing, with the nearest names, or that cuts a stacked tensor,
    and when no parameter is left to train.
    """
    names = _published(architecture)
    chosen = _matched(names, trainable, "train.trainable") - _matched(names, frozen, "train.frozen")
    if all(name.endswith(_BIAS) for name in chosen):
        raise ConfigError(
            f"train.trainable ({_listed(trainable)}) without train.frozen ({_listed(frozen)}) leaves no parameter "
            "to train; name at least one"
        )
    return frozenset(chosen)


def _published(architecture: DeepSeekV4Config) -> dict[str, tuple[str, ...]]:
    """Published names of the parts of each parameter and router bias, by our name."""
    parts = {stack.ours: tuple(stack.names()) for stack in stacks(architecture)}
    owner = {part: ours for ours, names in parts.items() for part in names}
    published = (t.name for t in published_tensors(architecture) if not t.name.endswith(_TABLE))
    ours = dict.fromkeys(owner.get(name, name) for name in published)
    return {name: parts.get(name, (name,)) for name in ours}


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
