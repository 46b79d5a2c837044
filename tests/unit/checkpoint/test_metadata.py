"""The plan of a stored state is a pickle, which must not be able to run anything."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fullweight.checkpoint.manifest import CorruptError
from fullweight.checkpoint.metadata import PlanReader


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3, dtype=torch.int64)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    return tmp_path


class _Calls:
    """Unpickled by a reader that does not look, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_plan_is_the_one_that_the_library_reads(saved: Path) -> None:
    """Same tensors, same places, and a load through it fills the same values."""
    assert (
        PlanReader(saved).read_metadata().storage_data == dcp.FileSystemReader(saved).read_metadata().storage_data
    )
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.int64)}
    dcp.load(state, storage_reader=PlanReader(saved), no_dist=True)
    assert torch.equal(state["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(state["b"], torch.arange(3))


def test_a_plan_that_calls_something_is_refused_and_not_run(saved: Path) -> None:
    """The library's own reader would have made the folder."""
    made = saved / "made"
    plan = dcp.FileSystemReader(saved).read_metadata()
    plan.planner_data = {"a": _Calls(made)}
    (saved / ".metadata").write_bytes(pickle.dumps(plan))
    with pytest.raises(CorruptError, match=r"it names posix\.mkdir"):
        PlanReader(saved).read_metadata()
    assert not made.exists()
    dcp.FileSystemReader(saved).read_metadata()
    assert made.exists()


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", ".."])
def test_a_plan_cannot_name_files_of_other_folders(saved: Path, name: str) -> None:
    """Else a stranger's checkpoint could have any file read as a tensor."""
    plan = dcp.FileSystemReader(saved).read_metadata()
    next(iter(plan.storage_data.values())).relative_path = name
    (saved / ".metadata").write_bytes(pickle.dumps(plan))
    with pytest.raises(CorruptError, match="no file of that folder"):
        PlanReader(saved).read_metadata()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([1]))]
)
def test_what_is_no_plan_is_told(saved: Path, content: bytes) -> None:
    """One message, whatever the bytes."""
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(CorruptError, match="no plan of a stored state"):
        PlanReader(saved).read_metadata()
