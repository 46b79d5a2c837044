"""Published folders that are wrong: one error that names the tensor or the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullweight.checkpoint import hf
from fullweight.checkpoint.published import INDEX
from fullweight.core.errors import CheckpointError

from .formats import EXPERT, WKV, copy, edit


def _set(name: str, value: Callable[[Tensor], Tensor]) -> tuple[str, Callable[[dict[str, Tensor]], object]]:
    return name, lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


def _without(name: str) -> tuple[str, Callable[[dict[str, Tensor]], object]]:
    return name, lambda tensors: tensors.pop(name)


def _nan(scale: Tensor) -> Tensor:
    wrong = scale.clone()
    wrong.view(torch.uint8)[1, 0] = 255
    return wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set(f"{WKV}.scale", lambda t: t[:, :1]),
            rf"\.safetensors: {WKV}\.scale has shape \[1, 1\], expected \[1, 2\]",
        ),
        (_set(f"{EXPERT}.scale", lambda t: t[:-1]), rf"{EXPERT}\.scale has shape \[143, 3\], expected \[144, 3\]"),
        (
            _set(f"{EXPERT}.scale", _nan),
            rf"\.safetensors: {EXPERT}\.weight: the scale of block \[1, 0\] is NaN \(byte 255\)",
        ),
        (_set(f"{WKV}.scale", lambda t: _nan(t.T.contiguous()).T), rf"{WKV}\.weight: the scale of block \[0, 1\]"),
        (_set(f"{EXPERT}.scale", lambda t: t.float()), rf"{EXPERT}\.scale is stored as float32"),
        (_set(f"{WKV}.scale", lambda t: t.view(torch.uint8)), rf"{WKV}\.scale is stored as uint8"),
        (
            _set(f"{WKV}.weight", lambda t: t.view(torch.uint8)),
            rf"\.safetensors: {WKV}\.weight is stored as uint8",
        ),
        (_set(f"{EXPERT}.weight", lambda t: t[:, :-1]), rf"{EXPERT}\.weight has shape \[144, 35\], expected .*36"),
        (_without(f"{EXPERT}.scale"), rf"{EXPERT}\.scale is missing"),
        (_without(f"{EXPERT}.weight"), rf"missing {EXPERT}\.weight; left over {EXPERT}\.scale"),
        (_set(f"{WKV}.weight", lambda t: t.to(torch.bfloat16)), rf"left over {WKV}\.scale"),
        (_set("norm.weight", lambda t: t.to(torch.float8_e4m3fn)), r"norm\.weight is stored as float8_e4m3fn"),
        (_set("layers.0.ffn.gate.tid2eid", lambda t: t.to(torch.int8)), "tid2eid is stored as int8"),
        (_set("layers.0.ffn.gate.tid2eid", lambda t: t - 9), "tid2eid names experts outside 0 to 3"),
    ],
)
def test_a_hostile_tensor_is_named(
    published: Callable[[str], Path],
    tmp_path: Path,
    change: tuple[str, Callable[[dict[str, Tensor]], object]],
    message: str,
) -> None:
    """Wrong scales, dtypes, shapes and names: one error that names the tensor, from headers where they tell."""
    folder = copy(published("fp4"), tmp_path / "copy")
    edit(folder, *change)
    with pytest.raises(CheckpointError, match=message):
        hf.load_model(folder)


def test_a_tensor_in_two_shards_is_refused(published: Callable[[str], Path], tmp_path: Path) -> None:
    """Which of the two would be loaded is chance; the index does not settle it."""
    folder = copy(published("fp4"), tmp_path / "copy")
    first, second = sorted(folder.glob("*.safetensors"))[1:3]
    stolen = {"norm.weight": torch.zeros(144, dtype=torch.bfloat16)}
    save_file({**load_file(first), **stolen}, first)
    for index in (True, False):
        if not index:
            (folder / INDEX).unlink()
        with pytest.raises(CheckpointError, match=r"norm\.weight lies in both .*00002.* and .*00006"):
            hf.load_model(folder)
    assert second.exists()


def test_an_index_that_disagrees_with_the_files_is_refused(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    """A missing file, a tensor that is elsewhere, nowhere, or not named: each by name."""
    folder = copy(published("fp4"), tmp_path / "copy")
    index = json.loads((folder / INDEX).read_text())
    weights = index["weight_map"]

    def refuses(changed: dict[str, str], message: str) -> None:
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(CheckpointError, match=message):
            hf.load_model(folder)

    refuses({**weights, "norm.weight": "model-00099-of-00007.safetensors"}, "missing model-00099")
    refuses(
        {**weights, "norm.weight": weights["embed.weight"]}, r"norm\.weight lies in model-00001.*but it lies in"
    )
    refuses({**weights, "ghost.weight": weights["embed.weight"]}, r"ghost\.weight lies in .* but no file has it")
    refuses({n: f for n, f in weights.items() if n != "norm.weight"}, r"does not name norm\.weight")


def test_draft_blocks_that_the_config_does_not_announce_are_refused(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    """They are not loaded as the MTP block; with the config's keys, a draft's missing part is named too."""
    folder = copy(published("dspark"), tmp_path / "copy")
    edit(folder, "mtp.1.attn.wkv.weight", lambda t: t.pop("mtp.1.attn.wkv.weight"))
    with pytest.raises(CheckpointError, match=r"missing mtp\.1\.attn\.wkv\.weight"):
        hf.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    plain = {k: v for k, v in config.items() if not k.startswith("dspark_")}
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="DSpark"):
        hf.load_model(folder)
