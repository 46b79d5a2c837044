"""A comparison names what differs and by how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.checkpoint.saved import facts, state

from fullweight.checkpoint import store
from fullweight.checkpoint.compare import compare, difference
from fullweight.checkpoint.manifest import verify


def test_equal_states_are_equal(tmp_path: Path) -> None:
    """Two saves of one state, whoever wrote them."""
    first = store.save(tmp_path, state(), facts(1)).path
    second = store.save(tmp_path, state(), facts(1, world={"ranks": 4, "axes": {"data": 4}})).path
    found = compare(verify(first), verify(second))
    assert found.same_state
    assert found.num_tensors == 3
    assert found.facts == {"world.ranks": (1, 4), "world.axes.data": (None, 4)}


def test_what_differs_is_named_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values against numbers worked out by hand; absent and reshaped tensors are told as such."""
    monkeypatch.setattr(store, "_BATCH_BYTES", 1)  # every tensor in a batch of its own
    a, b = state(), state()
    a["model.w"] = torch.tensor([[3.0, 4.0]])
    b["model.w"] = torch.tensor([[3.0, 4.5]])
    a["model.gone"] = b["model.new"] = torch.zeros(1)
    b["optimizer.adamw.w.step"] = torch.zeros(2)
    paths = [store.save(tmp_path, s, facts(n)).path for n, s in ((1, a), (2, b))]
    found = compare(*(verify(path) for path in paths))
    assert not found.same_state
    by_name = {d.name: d for d in found.tensors}
    assert sorted(by_name) == ["model.gone", "model.new", "model.w", "optimizer.adamw.w.step"]
    changed = by_name["model.w"]
    assert (changed.num_changed, changed.num_elements, changed.max_absolute) == (1, 2, 0.5)
    assert changed.relative == pytest.approx(0.5 / 5.0)
    assert by_name["model.gone"].note == "only in the first"
    assert by_name["optimizer.adamw.w.step"].note == "shape [] and [2]"
    assert found.facts == {"step": (1, 2), "position.step": (1, 2)}


def test_bits_decide() -> None:
    """Equal NaNs are equal, zeros of different sign are not; any dtype."""
    nan = torch.tensor([float("nan"), 1.0])
    assert difference("x", nan, nan.clone()) is None
    found = difference("x", torch.tensor([0.0]), torch.tensor([-0.0]))
    assert found is not None
    assert (found.num_changed, found.max_absolute, found.relative) == (1, 0.0, 0.0)
    grown = difference("x", torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert grown is not None
    assert grown.relative == float("inf")
    for dtype in (torch.uint8, torch.int64, torch.float64):
        assert difference("x", torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)) is None
