"""Which published tensors a checkpoint holds and how each is stored, worked out from its headers alone.

How a tensor is stored is read off its dtype, never its name: int8 is packed FP4, float8_e4m3 is FP8, and either
needs its scales; bfloat16, float16 and float32 are as they are. `mtp.*` tensors of a checkpoint whose config
announces DSpark are draft blocks: they are checked like the others and kept aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fullweight.checkpoint.published import (
    PublishedTensor,
    draft_tensors,
    fp4_scale_shape,
    fp8_scale_shape,
    packed_shape,
    published_tensors,
)
from fullweight.checkpoint.shards import DTYPES, Entry
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import is_copy

_PLAIN = {"BF16", "F16", "F32"}


@dataclass(frozen=True)
class Stored:
    """A published tensor as it lies in a folder: `storage` "FP4", "F8_E4M3", "BF16", "F16", "F32" or "I64"."""

    name: str
    shape: tuple[int, ...]
    storage: str
    scale: str | None = None  # name of its scales
    scale_dtype: str | None = None

    def stored_names(self) -> list[str]:
        """The tensors of the files that it is made of."""
        return [self.name] if self.scale is None else [self.name, self.scale]

    @property
    def exact_dtype(self) -> torch.dtype:
        """The narrowest dtype of ours that holds its values exactly (fp32 if none is narrower)."""
        if self.storage == "I64":
            return torch.int64
        narrow = self.storage in ("FP4", "BF16") or (self.storage == "F8_E4M3" and self.scale_dtype != "F32")
        return torch.bfloat16 if narrow else torch.float32


class Catalogue:
    """`tensors` of the model and `drafts` of DSpark by published name; `copies` are names that import ignores.

    `entries` are the headers' by stored name, `files` the file of each. Raises CheckpointError beginning with the
    folder `where` on a tensor missing or left over, and with its file on one misshapen or of a wrong dtype.
    """

    def __init__(
        self, where: Path, config: DeepSeekV4Config, entries: Mapping[str, Entry], files: Mapping[str, str]
    ) -> None:
        self.where, self.entries, self.files = where, entries, files
        self.copies = [name for name in entries if is_copy(name)]
        wanted, drafts = published_tensors(config), draft_tensors(config)
        self._check_names(wanted, drafts)
        self.tensors = {t.name: self._stored(t) for t in wanted}
        self.drafts = {t.name: self._stored(t) for t in drafts}

    def find(self, name: str) -> Stored:
        return self.tensors.get(name) or self.drafts[name]

    def draft_names(self) -> list[str]:
        """Stored tensors of draft blocks, scales included."""
        return [name for draft in self.drafts.values() for name in draft.stored_names()]

    @property
    def is_quantised(self) -> bool:
        return any(tensor.scale is not None for tensor in self.tensors.values())

    def _check_names(self, wanted: list[PublishedTensor], drafts: list[PublishedTensor]) -> None:
        names = [tensor.name for tensor in (*wanted, *drafts)]
        scales = {s for name in names if (s := self._scale(name)) is not None}
        missing = sorted(name for name in names if name not in self.entries)
        left = sorted(self.entries.keys() - set(names) - scales - set(self.copies))
        if missing or left:
            hint = ""
            if not drafts and any(".main_proj." in name or ".markov_head." in name for name in left):
                hint = " (draft blocks of DSpark, which its config.json does not announce: no dspark_block_size)"
            raise CheckpointError(
                f"{self.where} does not fit the model of its config.json: missing {few(missing)}; "
                f"left over {few(left)}{hint}"
            )

    def _scale(self, name: str) -> str | None:
        """The scales of a weight that needs them: `X.scale`, or V3's `X.weight_scale_inv`."""
        if name not in self.entries or self.entries[name].dtype in _PLAIN:
            return None
        stem = name.removesuffix("weight")
        return next((n for n in (f"{stem}scale", f"{stem}weight_scale_inv") if n in self.entries), None)

    def _place(self, stored_name: str) -> str:
        return f"{self.where / self.files[stored_name]}: {stored_name}"

    def _stored(self, tensor: PublishedTensor) -> Stored:
        """Check a tensor's dtype and shape, and its scales'."""
        entry = self.entries[tensor.name]
        where, found = self._place(tensor.name), str(DTYPES[entry.dtype]).removeprefix("torch.")
        quantised = {"I8": "FP4", "F8_E4M3": "F8_E4M3"}.get(entry.dtype)
        allowed = {"I64"} if tensor.kind == "table" else _PLAIN
        if entry.dtype not in allowed and (quantised is None or len(tensor.shape) != 2 or tensor.kind == "table"):
            expected = "int64" if tensor.kind == "table" else "float32, bfloat16 or float16"
            if len(tensor.shape) == 2 and tensor.kind != "table":
                expected += ", float8_e4m3fn or int8 (packed FP4) with scales"
            raise CheckpointError(f"{where} is stored as {found}; expected {expected}")
        shape = packed_shape(tensor.name, tensor.shape) if quantised == "FP4" else tensor.shape
        if entry.shape != shape:
            raise CheckpointError(f"{where} has shape {list(entry.shape)}, expected {list(shape)}")
        if quantised is None:
            return Stored(tensor.name, tensor.shape, entry.dtype)
        scale = self._scale(tensor.name)
        if scale is None:
            needed = f"{tensor.name.removesuffix('weight')}scale"
            raise CheckpointError(f"{where} is stored as {found}, which needs its scales, but {needed} is missing")
        scales = self.entries[scale]
        allowed = {"F8_E8M0"} if quantised == "FP4" else {"F8_E8M0", "F32"}
        if scales.dtype not in allowed:
            names = " or ".join(sorted(str(DTYPES[d]).removeprefix("torch.") for d in allowed))
            found = str(DTYPES[scales.dtype]).removeprefix("torch.")
            raise CheckpointError(f"{self._place(scale)} is stored as {found}; expected {names}")
        expected_shape = (fp4_scale_shape if quantised == "FP4" else fp8_scale_shape)(tensor.shape)
        if scales.shape != expected_shape:
            raise CheckpointError(
                f"{self._place(scale)} has shape {list(scales.shape)}, expected {list(expected_shape)} for "
                f"{tensor.name} {list(tensor.shape)}"
            )
        return Stored(tensor.name, tensor.shape, quantised, scale, scales.dtype)


def few(names: list[str]) -> str:
    """The first three names and how many more."""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
