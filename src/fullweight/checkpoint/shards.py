"""safetensors files read and written a few rows at a time.

The library reads and writes whole tensors or whole files; a model of a trillion parameters must not need either.
The format is small: eight bytes of header length, a JSON header of names with dtype, shape and byte range, then
the data without gaps. Everything in a header is checked when the file is opened, so that a truncated or forged
file is refused before any weight is read. Reading is by position into memory of our own: mapped pages would
count as this process's memory.
Source: the safetensors format description.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fullweight.checkpoint.published import ITEM_BYTES
from fullweight.core.errors import CheckpointError

DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: safetensors dtype, shape, and its bytes from `start` to `stop` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dim (of the whole, for a scalar)."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype that checkpoints use."""
    return _NAMES[dtype]


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's data, row by row; a view where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def parse_header(header: bytes, where: str) -> dict[str, Entry]:
    """Entries of a header's JSON in the order of their data; raises CheckpointError on anything inconsistent."""
    try:
        listed = json.loads(header, object_pairs_hook=_no_duplicates)
        if not isinstance(listed, dict):
            raise ValueError("its header is no JSON object")
        listed.pop("__metadata__", None)
        entries = {name: _entry(name, value) for name, value in listed.items()}
        stop = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != stop:
                raise ValueError(f"{name} begins at byte {entry.start}, expected {stop}")
            stop = entry.stop
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged or no safetensors file: {error}") from None
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"its header names {key} twice")
        found[key] = value
    return found


def _entry(name: str, value: Any) -> Entry:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name} is stored as {dtype}; expected one of {', '.join(ITEM_BYTES)}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {list(shape)} and bytes {start} to {stop}")
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has {stop - start} bytes; {dtype} {list(shape)} needs another number")
    return Entry(dtype, shape, start, stop)


class ShardReader:
    """One open file: `entries` by name in the order of their data, `header` as it lies in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        try:
            size = os.fstat(self._descriptor).st_size
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} is damaged or no safetensors file: it has {size} bytes, its header says {length}"
                )
            self.header = os.pread(self._descriptor, length, 8)
            self.entries = parse_header(self.header, str(path))
            self._data = 8 + length
            expected = self._data + max((e.stop for e in self.entries.values()), default=0)
            if size != expected:
                raise CheckpointError(
                    f"{path} is damaged: it has {size} bytes, its header says {expected}; fetch it again"
                )
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices `start` to `stop` of the first dim of a tensor, in its stored dtype."""
        entry = self.entries[name]
        if not entry.shape:
            return self._bytes(entry.start, entry.num_bytes).view(DTYPES[entry.dtype]).view(())
        stop = entry.shape[0] if stop is None else stop
        raw = self._bytes(entry.start + start * entry.row_bytes, (stop - start) * entry.row_bytes)
        return raw.view(DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])

    def _bytes(self, start: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        view, done = as_bytes(buffer), 0
        while done < count:
            try:
                got = os.preadv(self._descriptor, [view[done:]], self._data + start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{self.path} ends early: it was cut while it was read")
            done += got
        return buffer

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A header for tensors (name: dtype, shape), laid out as the library does: larger items first, then names."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda i: (-ITEM_BYTES[i[1][0]], i[0])):
        stop = start + math.prod(shape) * ITEM_BYTES[dtype]
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


class ShardWriter:
    """A file with a given header, filled in any order; `finish` checks that every byte came and syncs it."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path, self.entries = path, parse_header(header, str(path))
        self._data = 8 + len(header)
        self._filled = dict.fromkeys(self.entries, 0)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._put(0, len(header).to_bytes(8, "little") + header)
        except BaseException:
            self.close()
            raise

    def append(self, name: str, rows: Tensor) -> memoryview:
        """Write the next rows of a tensor (its stored dtype); returns the bytes written, for hashing."""
        entry = self.entries[name]
        data = as_bytes(rows)
        filled = self._filled[name]
        assert DTYPES[entry.dtype] == rows.dtype, (name, entry.dtype, rows.dtype)
        assert filled + len(data) <= entry.num_bytes, name
        self._put(self._data + entry.start + filled, data)
        self._filled[name] = filled + len(data)
        return data

    def finish(self) -> None:
        unfilled = [n for n, e in self.entries.items() if self._filled[n] != e.num_bytes]
        assert not unfilled, f"{self.path}: {unfilled[:3]} not written"
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _put(self, position: int, data: bytes | memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], position + done)


def write_all(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A file of whole tensors that are already in memory."""
    held = dict(tensors)
    writer = ShardWriter(path, make_header({n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in held.items()}))
    try:
        for name, tensor in held.items():
            writer.append(name, tensor)
        writer.finish()
    finally:
        writer.close()
