"""A model in parts, one behind the other: which blocks each runs. Imports no torch.

A part is a run of main layers. The first one also embeds the tokens, the last one also predicts (final norm,
head) and holds the MTP block, which reads what the head reads. Between parts pass the streams and, for the MTP
block, the embedding of each token's next one. Layers keep their numbers, so names, tables and roles do not depend
on where the cuts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Main layers `layers` (a range of their numbers), and what lies before the first or behind the last."""

    layers: range
    is_first: bool
    is_last: bool


def parts_of(layer_counts: Sequence[int]) -> tuple[Part, ...]:
    """The parts that run so many main layers each, in order.

    >>> [part.layers for part in parts_of([2, 1])]
    [range(0, 2), range(2, 3)]
    """
    stops = [sum(layer_counts[: i + 1]) for i in range(len(layer_counts))]
    last = len(layer_counts) - 1
    return tuple(
        Part(range(stop - count, stop), i == 0, i == last)
        for i, (count, stop) in enumerate(zip(layer_counts, stops, strict=True))
    )


def pieces(num_layers: int, with_mtp: bool) -> tuple[str, ...]:
    """Names of all that a training pass goes through, in order: what can be watched and repeated alone.

    >>> pieces(2, True)
    ('embedding', 'layer-0', 'layer-1', 'mtp', 'head')
    """
    layers = (f"layer-{i}" for i in range(num_layers))
    return ("embedding", *layers, *(("mtp",) if with_mtp else ()), "head")


def pieces_of(part: Part, with_mtp: bool) -> tuple[str, ...]:
    """Those of a part, in order.

    >>> [pieces_of(part, with_mtp=False) for part in parts_of([1, 1])]
    [('embedding', 'layer-0'), ('layer-1', 'head')]
    """
    every = pieces(part.layers.stop, with_mtp)
    held = every[1 + part.layers.start : 1 + part.layers.stop]
    return (*(every[:1] if part.is_first else ()), *held, *(every[1 + part.layers.stop :] if part.is_last else ()))
