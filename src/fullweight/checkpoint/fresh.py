"""A checkpoint of fresh weights, written as they are drawn: of any size, in the memory of a few rows.

What is written is what `init.initialise` would put into a model in memory and `export.write_checkpoint` would
write, bit for bit. A stack of experts is drawn in the order of its rows, which is the order in which its published
matrices are written, so nothing is drawn twice.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fullweight.checkpoint.export import Progress, write_checkpoint
from fullweight.checkpoint.published import LAYOUTS, published_tensors, stored_tensors
from fullweight.checkpoint.receipt import Receipt
from fullweight.checkpoint.shards import as_bytes
from fullweight.core.machine import require_disk
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import Part, stacks
from fullweight.models.deepseek_v4.init import FreshTensor

FreshFormat = Literal["bfloat16", "float32"]


class FreshWeights:
    """Rows of published tensors of a fresh model; those of one of our tensors in ascending order, once."""

    def __init__(self, config: DeepSeekV4Config, seed: int) -> None:
        self._config, self._seed = config, seed
        self._shapes = {tensor.name: tensor.shape for tensor in published_tensors(config)}
        self._stacks = {part.name: (stack.ours, part) for stack in stacks(config) for part in stack.places()}
        self._stack_shapes = {stack.ours: stack.shape for stack in stacks(config)}
        self._open: dict[str, FreshTensor] = {}
        self._hashes: dict[str, hashlib._Hash] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        ours, part = self._stacks.get(name, (name, Part(name, self._shapes[name])))
        shape = self._stack_shapes.get(ours, part.shape)
        if ours not in self._open:
            self._open[ours] = FreshTensor(ours, shape, self._config, self._seed)
        first = part.row + (part.expert or 0) * (shape[1] if len(shape) == 3 else 0)
        rows = self._open[ours].rows(first + start, first + stop)
        if first + stop == (shape[0] * shape[1] if len(shape) == 3 else shape[0]):
            del self._open[ours]  # the last rows: what it held is not needed any more
        if start == 0:
            self._hashes[name] = hashlib.sha256()
        self._hashes[name].update(as_bytes(rows))
        return rows

    def origin(self, name: str) -> Any:
        ours, part = self._stacks.get(name, (name, None))
        shape = self._shapes[name] if part is None else part.shape
        dtype = "int64" if name.endswith("tid2eid") else "float32"
        return {"name": ours, "dtype": dtype, "shape": list(shape), "sha256": self._hashes.pop(name).hexdigest()}


def payload_bytes(config: DeepSeekV4Config, place: Path, form: str) -> int:
    """Bytes of the tensors of a fresh checkpoint in the layout `form`.

    Raises ConfigError if the disk under `place` has no room for them.
    """
    fix = "free some, or choose another folder"
    count = config.num_parameters(mtp=True)
    what = f"a checkpoint of {count:,} parameters in {form}"
    require_disk(place, count * (4 if form == "float32" else 2), what, fix)  # before so many tensors are listed
    found = sum(tensor.num_bytes for tensor in stored_tensors(published_tensors(config), LAYOUTS[form]))
    require_disk(place, found, what, fix)
    return found


def write_fresh(
    config: DeepSeekV4Config, place: Path, form: FreshFormat, seed: int, progress: Progress | None = None
) -> Receipt:
    """Write fresh weights as "bfloat16" or "float32" into the new folder `place`; returns the receipt.

    Raises ConfigError where the disk has too little room, and CheckpointError as `write_checkpoint`.
    """
    payload_bytes(config, place, form)
    return write_checkpoint(
        FreshWeights(config, seed), config, place, form, origin=f"fresh weights, seed {seed}", progress=progress
    )
