"""safetensors files by the row: the library reads ours, we read the library's, and damage is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fullweight.checkpoint.shards import ShardReader, ShardWriter, dtype_name, make_header
from fullweight.core.errors import CheckpointError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.int8).view(4, 3),
    "a.scale": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "a.weight": torch.randn(7, 3).to(torch.float8_e4m3fn),
    "wide": torch.randn(3, 2, 2),
    "half": torch.randn(9).to(torch.bfloat16),
    "table": torch.arange(6).view(2, 3),
    "one": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    """Whole tensors and ranges of rows, every dtype, scalars and empty tensors."""
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    with ShardReader(tmp_path / "x") as reader:
        assert reader.entries.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            found = reader.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        assert torch.equal(reader.read("wide", 1, 3), TENSORS["wide"][1:])
        assert reader.read("wide", 2, 2).shape == (0, 2, 2)


def test_writes_what_the_library_would(tmp_path: Path) -> None:
    """Written in pieces and out of order, the file equals the library's, byte for byte."""
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    header = make_header({n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in TENSORS.items()})
    writer = ShardWriter(tmp_path / "y", header)
    for name in reversed(TENSORS):
        tensor = TENSORS[name]
        rows = tensor.shape[0] if tensor.dim() else 0
        for part in (tensor[: rows // 2], tensor[rows // 2 :]) if rows > 1 else (tensor,):
            writer.append(name, part)
    writer.finish()
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()
    assert load_file(tmp_path / "y").keys() == TENSORS.keys()
    with safe_open(tmp_path / "y", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_writer_knows_what_is_not_filled(tmp_path: Path) -> None:
    """A file with a hole is a programmer's mistake, not a checkpoint."""
    writer = ShardWriter(tmp_path / "x", make_header({"a": ("F32", (4,))}))
    writer.append("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="'a'"):
        writer.finish()
    with pytest.raises(AssertionError):
        writer.append("a", torch.zeros(2))
    writer.close()


def forged(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_header_that_cannot_be_written_leaves_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file keeps its disk full, and its mount busy, after the folder is removed."""

    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        ShardWriter(path, make_header({"a": ("F32", (2,))}))
    assert str(path) not in {os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x10\0\0", "3 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header says"),
        (forged(b"\xff\xfe"), "damaged or no safetensors"),
        (forged(b"[" * 100_000), "damaged or no safetensors"),
        (forged([1]), "no JSON object"),
        (forged({"a": 3}), "damaged or no safetensors"),
        (forged({"a": {**ENTRY, "dtype": "F4"}}), "a is stored as F4"),
        (forged({"a": {**ENTRY, "dtype": "F64"}}), "a is stored as F64"),
        (forged({"a": {**ENTRY, "shape": [3]}}), "a has 8 bytes"),
        (forged({"a": {**ENTRY, "shape": [-2]}}), "a has shape"),
        (forged({"a": {**ENTRY, "shape": [True, 2]}}), "a has shape"),
        (forged({"a": {**ENTRY, "data_offsets": [0]}}), "damaged or no safetensors"),
        (forged({"a": {**ENTRY, "data_offsets": [8, 16]}}), "a begins at byte 8"),
        (forged({"a": ENTRY, "b": ENTRY}), "b begins at byte 0"),
        (forged({"a": ENTRY}, b"\0" * 7), r"has \d+ bytes, its header says"),
        (forged({"a": ENTRY}, b"\0" * 9), r"has \d+ bytes, its header says"),
        (forged(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}"), "a twice"),
    ],
)
def test_a_forged_or_cut_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """One error with the file's name before any weight is read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        ShardReader(path)
    assert "model.safetensors" in str(refusal.value)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Opening checked the size; later the data is gone."""
    path = tmp_path / "x"
    save_file({"a": torch.zeros(100)}, path)
    with ShardReader(path) as reader:
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match="ends early"):
            reader.read("a")
