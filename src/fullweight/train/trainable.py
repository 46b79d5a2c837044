"""Parameters that do not train: how a model is told, and what that changes for sharding.

A frozen parameter has no gradient, no moments and no decay, and comes back bit for bit in the export. A router's
bias is no optimiser's parameter, but it is learnt by a rule, which the same choice switches off. Which names a
recipe chooses is `checkpoint/selection.py`'s to say. Left out: learning rates by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fullweight.models.deepseek_v4.block import Block
from fullweight.models.deepseek_v4.indexer import Indexer
from fullweight.models.deepseek_v4.model import DeepSeekV4, parameters_of


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
