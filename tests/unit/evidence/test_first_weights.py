"""The first weights: read only when every byte is what the receipt of the run's first reading says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.saved import facts

from fullweight.checkpoint.hf import export_checkpoint, load_weights
from fullweight.checkpoint.imported import load_receipt
from fullweight.checkpoint.manifest import Facts
from fullweight.evidence.first_weights import FirstWeights, first_weights
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

TINY = DeepSeekV4Config.preset("tiny")
NAME = "layers.1.ffn.experts.gate_up"


def described(folder: Path | None) -> Facts:
    config = {"model": {"checkpoint": None if folder is None else str(folder)}, "train": {"seed": 7}}
    return facts(model=TINY.to_published(), config=config)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A published folder, FP8 and FP4 as released, and beside it the receipt of a run that read it."""
    folder = tmp_path / "source"
    export_checkpoint(initialise(DeepSeekV4(TINY, ops="reference"), 3), folder, "fp4")
    target = DeepSeekV4(TINY, ops="reference")
    load_receipt(folder, [load_weights(target, folder, hashing=True)]).write(tmp_path / "import.json")
    torch.save(target.state_dict(), tmp_path / "loaded.pt")
    return folder


def asked(folder: Path, receipt: Path, place: Path | None = None) -> FirstWeights:
    with first_weights(described(folder), receipt, place) as found:
        return found


def test_a_checkpoint_is_read_as_the_run_read_it(source: Path, tmp_path: Path) -> None:
    """Decoded values, bit for bit, also where the folder has moved to."""
    loaded = torch.load(tmp_path / "loaded.pt")
    moved = source.rename(tmp_path / "moved")
    with first_weights(described(source), tmp_path / "import.json", moved) as found:
        assert found.reader is not None
        for name in (NAME, "embed.weight", "layers.0.ffn.gate.tid2eid"):
            read = found.reader.read({name: tuple(loaded[name].shape)})[name]
            assert torch.equal(read, loaded[name]), name
    gone = asked(source, tmp_path / "import.json")
    assert gone.reader is None
    assert "--initial" in str(gone.reason)


def test_another_byte_is_another_checkpoint(source: Path, tmp_path: Path) -> None:
    """One bit of one file's data: the reason names the tensor, and nothing is read."""
    path = sorted(source.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    found = asked(source, tmp_path / "import.json")
    assert found.reader is None
    assert "is not what the run began with" in str(found.reason)


@pytest.mark.parametrize("damage", ["absent", "no json", "a tensor less", "no parts"])
def test_a_receipt_that_proves_nothing_is_told(damage: str, source: Path, tmp_path: Path) -> None:
    """Missing, damaged, or of another reading."""
    receipt = tmp_path / "import.json"
    values: dict[str, Any] = json.loads(receipt.read_text())
    if damage == "absent":
        receipt.unlink()
    elif damage == "no json":
        receipt.write_text("{")
    else:
        if damage == "a tensor less":
            values["read"] = values["read"][1:]
        else:
            del values["read"][0]["parts"]
        receipt.write_text(json.dumps(values))
    found = asked(source, receipt)
    assert found.reader is None
    assert found.reason


def test_fresh_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    """Drawn a tensor at a time, the bits are those of a model initialised whole."""
    whole = initialise(DeepSeekV4(TINY, ops="reference"), 7).state_dict()
    with first_weights(described(None), tmp_path / "none") as found:
        assert found.reader is not None
        for name, tensor in whole.items():
            assert torch.equal(found.reader.read({name: tuple(tensor.shape)})[name], tensor), name
