"""A checkpoint is whole or it is not there."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from fullweight.checkpoint import store
from fullweight.core.errors import CheckpointError


def state(value: float = 1.0, rows: int = 4) -> dict[str, Any]:
    return {"model": {"w": torch.full((rows, 3), value)}, "host": {"step": int(value), "names": ["a", "b"]}}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """Tensors come back bit for bit, host values as they were."""
    saved = {"model": {"w": torch.randn(5, 3)}, "host": {"step": 7, "names": ["x"]}}
    path = store.save(tmp_path, 7, saved)
    loaded = {"model": {"w": torch.zeros(5, 3)}, "host": {"step": 0, "names": ["", ""]}}
    store.load(path, loaded)
    assert torch.equal(loaded["model"]["w"], saved["model"]["w"])
    assert loaded["host"] == saved["host"]


def test_latest_ignores_what_is_not_complete_and_sorts_by_number(tmp_path: Path) -> None:
    """step-100 is newer than step-20; an unfinished folder and one without its list do not count."""
    for step in (100, 20):
        store.save(tmp_path, step, state())
    (tmp_path / "step-200").mkdir()
    (tmp_path / ".writing-step-300").mkdir()
    (tmp_path / "step-abc").mkdir()
    assert store.latest(tmp_path).name == "step-100"


def test_nothing_complete_is_an_error(tmp_path: Path) -> None:
    """The message says what to do."""
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        store.latest(tmp_path / "absent")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Older ones go after the new one is whole."""
    for step in range(1, 6):
        store.save(tmp_path, step, state(step), keep=2)
    assert [s for s, _ in store.completed(tmp_path)] == [4, 5]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """A resumed run may reach a step that an earlier attempt saved."""
    store.save(tmp_path, 3, state(1.0))
    store.save(tmp_path, 3, state(2.0))
    loaded = state(0.0)
    store.load(tmp_path / "step-3", loaded)
    assert loaded["model"]["w"][0, 0] == 2.0


@pytest.mark.parametrize("damage", ["truncate", "delete", "scramble", "list"])
def test_damage_is_detected_before_anything_is_loaded(tmp_path: Path, damage: str) -> None:
    """A torn file is named and the target stays untouched."""
    path = store.save(tmp_path, 1, state(5.0))
    shard = next(p for p in path.iterdir() if p.suffix == ".distcp")
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "scramble":
        shard.write_bytes(bytes(len(shard.read_bytes())))
    elif damage == "delete":
        shard.unlink()
    else:
        (path / store.COMPLETE).write_text("{")
    target = state(0.0)
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(path, target)
    assert target["model"]["w"].sum() == 0


def test_another_models_checkpoint_is_named(tmp_path: Path) -> None:
    """Missing tensors and other shapes say which tensor, found and expected."""
    path = store.save(tmp_path, 1, state(rows=4))
    with pytest.raises(CheckpointError, match=r"model\.w has shape \[4, 3\], this model expects \[6, 3\]"):
        store.load(path, state(rows=6))
    with pytest.raises(CheckpointError, match=r"holds no model\.other"):
        store.load(path, {"model": {"other": torch.zeros(1)}})


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
    store.save(tmp_path, 1, state(1.0))
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", failure)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(tmp_path, 2, state(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    store.load(store.latest(tmp_path), state())


def test_a_programming_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the disk's refusals are turned into a user's message."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(CheckpointException, match="a bug"):
        store.save(tmp_path, 2, state(2.0))
