"""One digest of an exact training state, the same however many ranks hold it or wrote it.

A leaf of the tree (`merkle.py`) is the JSON of [name, dtype, shape, SHA-256 of the values], where the values are
whole, in row-major order and little-endian; leaves come in the order of their names. One more leaf, last, is the
position (steps, tokens, place in the data, skips) as JSON with sorted keys. So a root can be computed from any
library that reads the tensors, and it does not depend on files, shards or layout.

The weights, the optimisers' state, the counts of tokens and the random generators also have a root each: a run
that continued on more ranks has more generators, and the same weights.

A stored state is streamed; of a live one rank 0 reads the others' parts a tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.gather import WholeTensors
from fullweight.checkpoint.manifest import Generation
from fullweight.checkpoint.peers import Peers
from fullweight.evidence import merkle

PARTS = ("coverage", "model", "optimizer", "random")
"""First part of a tensor's name in a training state."""


@dataclass(frozen=True)
class StateRoot:
    """Hex roots of a training state: of all of it, and of each of its parts without the position."""

    root: str
    parts: dict[str, str]


def stored_root(generation: Generation) -> StateRoot:
    """The root of a verified generation, in this process alone, whatever ranks wrote it."""
    names = sorted(store.contents(generation))
    return _root(store.stream(generation, names), generation.manifest.facts.position)


def live_root(tensors: Mapping[str, Tensor], position: dict[str, Any], peers: Peers | None = None) -> StateRoot:
    """The root of a state in memory (`TrainState.tensors`, `.position`); all ranks together, on every rank."""
    peers = peers or Peers()
    whole, found = WholeTensors(tensors, peers), list[StateRoot]()

    def read() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(whole.known):
            yield name, whole.read(name)

    whole.drive(lambda: found.append(_root(read(), position)))
    return peers.on_main(lambda: found[0])


def leaf(name: str, tensor: Tensor) -> bytes:
    """The leaf of one whole tensor on the host."""
    return _json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest(tensor)])


def digest(tensor: Tensor) -> str:
    """Hex SHA-256 of the values in row-major order, little-endian as every machine that torch supports."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


def _root(tensors: Iterable[tuple[str, Tensor]], position: dict[str, Any]) -> StateRoot:
    leaves: dict[str, list[bytes]] = {part: [] for part in PARTS}
    ordered = []
    for name, tensor in tensors:
        ordered.append(leaf(name, tensor))
        leaves[name.partition(".")[0]].append(ordered[-1])
    ordered.append(_json(["position", position]))
    return StateRoot(merkle.root(ordered), {part: merkle.root(found) for part, found in leaves.items()})


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
