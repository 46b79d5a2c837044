"""The root of a training state is what its definition says, and depends on the state alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tests.unit.checkpoint.saved import facts, save, state

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import verify
from fullweight.evidence.state_root import live_root, stored_root


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if len(leaves) <= 1:
        return sha256(b"\0" + leaves[0]) if leaves else sha256(b"")
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return sha256(b"\1" + by_definition(leaves[:k]) + by_definition(leaves[k:]))


def test_the_root_follows_its_definition(tmp_path: Path) -> None:
    """From the bytes of numpy arrays and the format's text, without any of our code."""
    tensors = state(2.0)
    leaves = []
    for name in sorted(tensors):
        array = tensors[name].numpy()
        text = json.dumps([name, "float32", list(array.shape), sha256(array.tobytes()).hex()])
        leaves.append(text.replace(", ", ",").encode())
    position = b'["position",{"data":{"epoch":0,"row":3},"step":5}]'
    given = {"step": 5, "data": {"row": 3, "epoch": 0}}
    expected = by_definition([*leaves, position]).hex()

    found = live_root(tensors, given)
    assert found.root == expected
    assert found.parts["model"] == by_definition(leaves[:2]).hex()
    assert found.parts["optimizer"] == by_definition(leaves[2:]).hex()
    assert found.parts["random"] == sha256(b"").hex()
    saved = store.save(tmp_path, tensors, facts(5, position=given))
    assert stored_root(verify(saved.path)) == found


def test_every_bit_of_a_state_is_in_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value, a sign of zero, a shape, a dtype, a name, the position: each gives another root."""
    monkeypatch.setattr(store, "_BATCH_BYTES", 1)  # every tensor on its own
    first = live_root(state(), {"step": 1})
    assert stored_root(verify(save(tmp_path, 1))) == first
    changed = {name: state() for name in ("value", "zero", "shape", "dtype", "name")}
    changed["value"]["model.noise"][3, 2] += 1e-6
    changed["zero"]["model.w"] = torch.tensor([[-0.0]])
    changed["shape"]["model.w"] = changed["shape"]["model.w"].reshape(3, 4)
    changed["dtype"]["model.w"] = changed["dtype"]["model.w"].view(torch.int32)
    changed["name"]["model.v"] = changed["name"].pop("model.w")
    zero = live_root({**state(), "model.w": torch.tensor([[0.0]])}, {"step": 1})
    roots = {live_root(tensors, {"step": 1}).root for tensors in changed.values()}
    roots |= {first.root, zero.root, live_root(state(), {"step": 2}).root}
    assert len(roots) == 8
