"""A checkpoint folder under the published names, opened: checked by its headers, then read a few rows at a time.

How a tensor is stored is read off its dtype, never its name: int8 is packed FP4, float8_e4m3 is FP8, and either
needs its scales; bfloat16, float16 and float32 are as they are. `mtp.*` tensors of a checkpoint whose config
announces DSpark are draft blocks: they are checked like the others and kept aside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fullweight.checkpoint import fp4, fp8
from fullweight.checkpoint.catalogue import Catalogue, few
from fullweight.checkpoint.published import (
    FP8_BLOCK,
    INDEX,
)
from fullweight.checkpoint.shards import ShardReader, as_bytes
from fullweight.core.errors import CheckpointError
from fullweight.core.strict_json import parse_json
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

UNFINISHED = re.compile(r"\..+\.writing-\d+")
"""Names of folders that an export is still filling, or was when it died."""
CHUNK_BYTES = 32 * 2**20
"""Decoded bytes handled at a time; reading and writing need a few times this beyond what they fill."""


@dataclass(frozen=True)
class PartRead:
    """Bytes `start` to `stop` of a stored tensor's data that were read in one go, and their SHA-256."""

    name: str
    start: int
    stop: int
    sha256: str


class PublishedFolder:
    """An open checkpoint folder; its `catalogue` says what it holds.

    Raises CheckpointError on a damaged file, and on any tensor missing, left over, misshapen or of a wrong dtype.

    With `hashing`, `parts_read` tells what was read of each tensor, and the SHA-256 of that.
    """

    def __init__(self, path: str | Path, hashing: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"no checkpoint folder at {self.path}")
        if UNFINISHED.fullmatch(self.path.resolve().name):
            raise CheckpointError(f"{self.path} is an export that was cut short; delete it and export again")
        self.config = DeepSeekV4Config.from_file(self.path)
        self.readers: dict[str, ShardReader] = {}
        self.files: dict[str, str] = {}  # stored name -> file
        self.hashing = hashing
        self.on_read: Callable[[str, int], None] | None = None  # told each stored tensor and the bytes read
        self._hashes: dict[str, hashlib._Hash] = {}
        self._hashed: dict[str, tuple[int, int]] = {}  # the bytes that went into the hash so far
        try:
            self._open()
            entries = {n: e for reader in self.readers.values() for n, e in reader.entries.items()}
            self.catalogue = Catalogue(self.path, self.config, entries, self.files)
        except BaseException:
            self.close()
            raise

    # ---- reading ------------------------------------------------------------------------------------

    def stored_names(self, name: str) -> list[str]:
        """The tensors of the files that a published tensor is made of."""
        return self.catalogue.find(name).stored_names()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a published tensor, decoded to its `exact_dtype`."""
        stored = self.catalogue.tensors[name]
        stop = stored.shape[0] if stop is None else stop
        out = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.exact_dtype)
        self.read_into(name, out, start)
        return out

    def read_into(self, name: str, out: Tensor, start: int = 0, column: int = 0) -> None:
        """Fill `out` with rows from `start` and columns from `column` on of a published tensor, decoded.

        `out` is any device's, dtype's or stride's; only the rows asked for are read, a chunk at a time.
        """
        stored = self.catalogue.tensors[name]
        for first, last in row_chunks(stored.shape, start, start + out.shape[0]):
            rows = out[first - start : last - start]
            codes = self.raw(name, first, last)
            whole = rows.dim() == 1 or rows.shape[1] == stored.shape[1]
            if stored.scale is None:
                rows.copy_(codes if whole else codes[:, column : column + rows.shape[1]])
                continue
            where = f"{self.path / self.files[name]}: {name}"
            direct = whole and rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16)
            decoded = rows if direct else torch.empty(last - first, stored.shape[1])
            if stored.storage == "FP4":
                fp4.decode(codes, self.raw(stored.scale, first, last), decoded, where)
            else:
                scales = self.raw(stored.scale, first // FP8_BLOCK, -(-last // FP8_BLOCK))
                fp8.decode(codes, scales, decoded, where, first % FP8_BLOCK)
            if not direct:
                rows.copy_(decoded[:, column : column + rows.shape[1]])

    def raw(self, stored_name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a stored tensor in its stored dtype."""
        rows = self.readers[self.files[stored_name]].read(stored_name, start, stop)
        if self.hashing:
            self._hash(stored_name, start, as_bytes(rows))
        if self.on_read is not None:
            self.on_read(stored_name, rows.numel() * rows.element_size())
        return rows

    def parts_read(self) -> list[PartRead]:
        """What was read of each stored tensor: the last stretch of rows, where there was more than one."""
        return [PartRead(name, *self._hashed[name], found.hexdigest()) for name, found in self._hashes.items()]

    def whole_hash(self, stored_name: str) -> str | None:
        """SHA-256 of a stored tensor's data if it was read from its first to its last row."""
        whole = self._hashed.get(stored_name) == (0, self.catalogue.entries[stored_name].num_bytes)
        return self._hashes[stored_name].hexdigest() if whole else None

    def hash_whole(self, stored_name: str) -> str:
        """SHA-256 of a stored tensor's data; read from the file unless it was read whole before."""
        entry, self.hashing = self.catalogue.entries[stored_name], True
        found = self.whole_hash(stored_name)
        if found is None:
            rows = entry.shape[0] if entry.shape else 1
            for first, last in row_chunks(entry.shape, 0, rows):
                self.raw(stored_name, first, last)
            found = self.whole_hash(stored_name)
        return found or hashlib.sha256().hexdigest()  # nothing to read

    def _hash(self, stored_name: str, start: int, data: memoryview) -> None:
        before = start * self.catalogue.entries[stored_name].row_bytes
        begin, end = self._hashed.get(stored_name, (before, -1))
        if end != before:  # not the rows after those that went in
            self._hashes[stored_name], begin = hashlib.sha256(), before
        self._hashes[stored_name].update(data)
        self._hashed[stored_name] = begin, before + len(data)

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()
        self.readers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- opening ------------------------------------------------------------------------------------

    def _open(self) -> None:
        index = read_index(self.path)
        for path in shard_paths(self.path):
            reader = self.readers[path.name] = ShardReader(path)
            for name in reader.entries:
                if name in self.files:
                    raise CheckpointError(f"{self.path}: {name} lies in both {self.files[name]} and {path.name}")
                self.files[name] = path.name
        for name, file in (index or {}).items():
            found = self.files.get(name)
            if found != file:
                where = "no file has it" if found is None else f"it lies in {found}"
                raise CheckpointError(f"{self.path / INDEX} says that {name} lies in {file}, but {where}")
        if index is not None and len(index) != len(self.files):
            strays = sorted(self.files.keys() - index.keys())
            raise CheckpointError(f"{self.path / INDEX} does not name {few(strays)}, which the files hold")


def row_chunks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover start to stop, each at most CHUNK_BYTES in fp32; inner bounds at multiples of 128."""
    row_bytes = 4
    for size in shape[1:]:
        row_bytes *= size
    rows = max(CHUNK_BYTES // max(row_bytes, 1) // FP8_BLOCK, 1) * FP8_BLOCK
    first = start
    while first < stop:
        last = min(stop, (first // FP8_BLOCK) * FP8_BLOCK + rows)
        yield first, last
        first = last


def read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None where there is no index."""
    index = folder / INDEX
    try:
        found = {str(k): str(v) for k, v in parse_json(index.read_bytes())["weight_map"].items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a checkpoint index: {error}") from None
    foreign = sorted({name for name in found.values() if Path(name).name != name})
    if foreign:
        raise CheckpointError(f"{index} points outside its folder: {few(foreign)}")
    return found


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one."""
    index = read_index(folder)
    names = sorted({*index.values()} if index is not None else {p.name for p in folder.glob("*.safetensors")})
    absent = [name for name in names if not (folder / name).is_file()]
    if not names or absent:
        raise CheckpointError(
            f"{folder} has no weights: {'missing ' + few(absent) if absent else 'no .safetensors file'}"
        )
    return [folder / name for name in names]
