"""A layer repeated alone gives what it gave inside of the model; another record of it is refuted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.processes import fullweight

from fullweight.audit import layer as module
from fullweight.audit.again import Means
from fullweight.audit.boundaries import read
from fullweight.audit.layer import LayerResult, repeat_layers
from fullweight.core.errors import CheckpointError

LAYERS = (0, 1, 2, 3)  # of the preset: hash routing, both kinds of compressed attention, a sliding window
SETTINGS = ["train.num_steps=2", "train.peak_flops_per_second=1e12", "eval.num_samples=0", "export.enabled=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    chosen = [part for s in SETTINGS for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", folder)
    assert ended.ok, ended.output
    return folder


@pytest.fixture(scope="module")
def boundaries(run: Path) -> Path:
    folder = run.parent / "boundaries"
    chosen = [part for i in LAYERS for part in ("--layer", str(i))]
    ended = fullweight("boundaries", run, "--step", "2", *chosen, "--out", folder)
    assert ended.ok, ended.output
    return folder


def test_each_layer_alone_gives_the_same_bits(run: Path, boundaries: Path) -> None:
    """In a fresh process, with the layer's own weights alone; what leaves a layer enters the next one."""
    ended = fullweight("replay", run, "--level", "layer", "--boundaries", boundaries)
    assert ended.ok, ended.output
    assert ended.output.count("verified: every bit is equal") == len(LAYERS), ended.output
    files = [read(boundaries / f"layer-{i}.safetensors") for i in LAYERS]
    for below, above in pairwise(files):
        assert torch.equal(below.tensors["leaving"], above.tensors["entering"])
        assert torch.equal(below.tensors["leaving_gradient"], above.tensors["entering_gradient"])
    for found in files:
        assert found.tensors["entering"].dtype == torch.bfloat16
        assert any("experts" in name for name in found.gradients)
        assert all(g["norm"] > 0 for name, g in found.gradients.items() if "norm.weight" in name)


def test_only_the_layer_is_read(run: Path, boundaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own tensors are all that leaves the disk as tensors."""
    asked: list[str] = []
    stream = module.store.stream

    def listening(generation: Any, names: Any) -> Any:
        asked.extend(names)
        return stream(generation, names)

    monkeypatch.setattr(module.store, "stream", listening)
    found = repeat_layers(run, alone(boundaries, run.parent / "one", lambda b: b), Means())
    assert [r.layer for r in found] == [1]
    assert asked
    assert all(name.startswith("model.layers.1.") for name in asked)


def alone(boundaries: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """Layer 1's file in a folder of its own, with something changed in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = change(read(boundaries / "layer-1.safetensors"))
    facts = {name: getattr(found, name) for name in found.__dataclass_fields__ if name != "tensors"}
    save_file(found.tensors, folder / "layer-1.safetensors", {"boundary": json.dumps(facts)})
    return folder


def changed(run: Path, boundaries: Path, folder: Path, change: Callable[[Any], Any], means: Means) -> LayerResult:
    [found] = repeat_layers(run, alone(boundaries, folder, change), means)
    return found


def test_what_a_layer_did_not_do_is_named(run: Path, boundaries: Path, tmp_path: Path) -> None:
    """Another output, another gradient of a parameter, on another stack too; rounding there is let pass."""

    def louder(boundary: Any) -> Any:
        boundary.tensors["leaving"] *= 1.25
        return boundary

    def frozen(boundary: Any) -> Any:
        gone = {n: g for n, g in boundary.gradients.items() if n != "attn.wq_b.weight"}
        return replace(boundary, gradients=gone)

    def smaller(boundary: Any) -> Any:
        boundary.gradients["attn.wkv.weight"]["norm"] *= 0.5
        boundary.gradients["attn.wkv.weight"]["sha256"] = "0" * 64
        return boundary

    for means in (Means(), Means(threads=2)):
        for change, name in ((louder, "leaving"), (frozen, "attn.wq_b.weight"), (smaller, "attn.wkv.weight")):
            found = changed(run, boundaries, tmp_path / "changed", change, means)
            assert found.divergent == name, found
    rounded = changed(run, boundaries, tmp_path / "same", lambda b: b, Means(threads=2))
    assert rounded.divergent is None
    assert rounded.stack == ("threads: 1 when recorded, 2 here",)


def test_what_is_no_boundary_is_refused(run: Path, boundaries: Path, tmp_path: Path) -> None:
    """No file, a torn one, one of another state, a layer that is not there."""
    with pytest.raises(CheckpointError, match="fullweight boundaries"):
        repeat_layers(run, tmp_path, Means())
    torn = tmp_path / "torn"
    torn.mkdir()
    content = (boundaries / "layer-1.safetensors").read_bytes()
    (torn / "layer-1.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        repeat_layers(run, torn, Means())
    other = alone(boundaries, tmp_path / "other", lambda b: replace(b, manifest_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="layer 1 was recorded from step-2 with manifest 0000"):
        repeat_layers(run, other, Means())
    ended = fullweight("boundaries", run, "--step", "2", "--layer", "9", "--out", tmp_path / "nine")
    assert ended.statuses == (1,)
    assert "there is no layer 9; this model has 0 to 3" in ended.output
    with safe_open(boundaries / "layer-1.safetensors", framework="pt") as stored:
        assert "tokens" in stored.keys()  # noqa: SIM118 - no dict
