"""A generation is whole, verified and exact, or it is not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.unit.checkpoint.saved import facts, loaded, save, state
from torch.distributed.checkpoint.api import CheckpointException

from fullweight.checkpoint import generations, hashing, store
from fullweight.checkpoint.manifest import verify
from fullweight.core.errors import CheckpointError


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """Every tensor comes back bit for bit, NaN and signed zero included."""
    saved = state(7.0)
    saved["model.w"][0] = torch.tensor([float("nan"), -0.0, 1e-45])
    path = store.save(tmp_path, saved, facts(7)).path
    for name, tensor in loaded(path).items():
        assert tensor.reshape(-1).view(torch.int32).tolist() == saved[name].reshape(-1).view(torch.int32).tolist()


def test_several_files_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large state is cut into files that are hashed side by side; nothing is lost between them."""
    monkeypatch.setattr(store, "_FILE_BYTES", 256)
    monkeypatch.setattr(store.Peers, "num_threads", 3)
    path = save(tmp_path, 3)
    assert len(list(path.glob("*.distcp"))) == 3
    assert all(torch.equal(a, b) for a, b in zip(loaded(path).values(), state(3.0).values(), strict=True))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Older ones go after the new one is whole and named."""
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in generations.listed(tmp_path)] == [4, 5]


def test_saving_a_step_again_overwrites_nothing(tmp_path: Path) -> None:
    """The second one gets a name of its own, is the newest, and `latest` names it."""
    first = save(tmp_path, 3, 1.0)
    second = save(tmp_path, 3, 2.0)
    assert [p.name for _, p in generations.listed(tmp_path)] == ["step-3", "step-3-2"]
    assert generations.newest(tmp_path) == second
    assert loaded(first)["model.w"][0, 0] == 1.0
    assert loaded(second)["model.w"][0, 0] == 2.0
    pointer = generations.read_pointer(tmp_path)
    assert pointer is not None
    assert pointer[0] == "step-3-2"


def test_another_models_checkpoint_is_named(tmp_path: Path) -> None:
    """Missing, further and other tensors say which one, found and expected; the target stays untouched."""
    generation = verify(save(tmp_path, 1))
    cases = {
        r"model\.w has shape \[4, 3\], this model expects \[6, 3\]": state(rows=6),
        r"holds no model\.other": {**state(), "model.other": torch.zeros(1)},
        r"holds model\.noise, which this model does not have": {"model.w": torch.zeros(4, 3)},
        r"model\.w is torch\.float32, this model expects torch\.bfloat16": {
            "model.w": torch.zeros(4, 3, dtype=torch.bfloat16)
        },
    }
    for said, target in cases.items():
        before = {name: tensor.clone() for name, tensor in target.items()}
        with pytest.raises(CheckpointError, match=said):
            store.load(generation, target)
        assert all(torch.equal(target[name], before[name]) for name in target)


def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_and_fail_to_close(self: Any, *args: Any, **kwargs: Any) -> None:
    """What torch.save does on a full disk: the archive cannot be closed either."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


@pytest.mark.parametrize("failure", [refuse, refuse_and_fail_to_close])
def test_a_full_disk_leaves_no_checkpoint_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., None]
) -> None:
    """One message; nothing half-written remains; the earlier checkpoint still loads."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", failure)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]
    assert generations.choose(tmp_path).generation.step == 1
    assert save(tmp_path, 2).name == "step-2"


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed and what is free are said before a byte is written."""
    monkeypatch.setattr(store, "free_bytes", lambda folder: 100)
    with pytest.raises(CheckpointError, match=r"are needed, 0\.0 MB are free"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_extra_thread_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's writer threads die silently; the state without their tensors must not become a checkpoint."""
    monkeypatch.setattr(store, "_FILE_BYTES", 256)
    monkeypatch.setattr(store.Peers, "num_threads", 3)
    write = hashing._HashingStream.write

    def fail_in_one(self: Any, data: Any) -> int:
        if self._file.name.endswith("__0_2_0.distcp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(hashing._HashingStream, "write", fail_in_one)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 1)
    assert generations.listed(tmp_path) == []


def test_a_disk_that_returns_other_bytes_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed while writing is compared with what can be read; the older checkpoint is not removed."""
    save(tmp_path, 1, keep=1)
    sync = os.fsync

    def lose_a_bit(descriptor: int) -> None:
        sync(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".distcp"):
            with open(name, "r+b") as stream:
                stream.seek(1000)
                byte = stream.read(1)[0]
                stream.seek(1000)
                stream.write(bytes([byte ^ 4]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose_a_bit)
        with pytest.raises(CheckpointError, match=r"returns other bytes than were written to __0_0_0\.distcp"):
            save(tmp_path, 2, keep=1)
    assert [p.name for _, p in generations.listed(tmp_path)] == ["step-1"]
    loaded(tmp_path / "step-1")


def test_a_programming_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the disk's refusals are turned into a user's message."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(CheckpointException, match="a bug"):
        save(tmp_path, 2)


def test_a_removal_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new generation is whole; the old one that could not go is told."""
    save(tmp_path, 1)

    def refuse_removal(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse_removal)
    with pytest.warns(UserWarning, match="step-1 could not be removed"):
        assert save(tmp_path, 2, keep=1).name == "step-2"
