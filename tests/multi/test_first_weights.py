"""Weights go straight into each rank's shard and out again: the bits of one process, no whole model anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.allocations import Allocations
from tests.processes import fullweight
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.checkpoint.export import ModelWeights, write_checkpoint
from fullweight.checkpoint.gather import WholeTensors
from fullweight.checkpoint.hf import load_model
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.plan import ExportFormat
from fullweight.checkpoint.source import SourceForm
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.core.config import read_toml
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.parallel.fsdp import shard
from fullweight.parallel.mesh import joined
from fullweight.train.config import RunConfig
from fullweight.train.trainable import sharding_units
from fullweight.train.weights import empty_model, fill

# 3 experts' stacks of rows and a vocabulary that no three ranks share evenly.
SIZES = {"hidden_size": 96, "moe_intermediate_size": 160, "n_routed_experts": 8, "vocab_size": 520}


def recipe(model: dict[str, object]) -> RunConfig:
    values = read_toml(Path("recipes/tiny_smoke.toml"))
    if "checkpoint" in model:
        del values["tokenizer"]
    values["train"] = {"num_steps": 4, "rows_per_step": 3}
    return RunConfig.resolve({**values, "model": model}, "test")


def rank_main(arguments: list[str]) -> int:
    """One rank: build, shard, fill, export; every tensor's hash, and peaks beyond the shards of each rank."""
    model_json, out = arguments
    config = recipe(json.loads(model_json))
    with joined("cpu") as alone:
        model = empty_model(config, config.model.architecture(), "cpu")
        ranks = alone.laid_out(config.layout(alone.size))
        assert ranks.meshes is not None
        shard(model, sharding_units(model), ranks.meshes.dense)
        with Allocations() as counted:
            model.to_empty(device="cpu")
            receipt = fill(model, config)
        beyond = ranks.gather(counted.peak - counted.live)
        sharded = sum(isinstance(t, DTensor) for t in model.state_dict().values())
        found = hashes({n: whole(t) for n, t in model.state_dict().items()})
        with Allocations(model.state_dict().values()) as counted:
            export_back(model, config, Path(out).with_name("back"))
        beyond += ranks.gather(counted.peak)
        if ranks.is_main:
            read = None if receipt is None else receipt.as_json()
            result = {"hashes": found, "beyond": beyond, "sharded": sharded, "receipt": read}
            Path(out).write_text(json.dumps(result))
        ranks.barrier()
    return 0


def export_back(model: DeepSeekV4, config: RunConfig, place: Path) -> None:
    """In the form of the source, or as float32 where the weights are fresh."""
    tensors, folder = WholeTensors(model.state_dict(), Peers()), config.model.checkpoint

    def write() -> None:
        source = None if folder is None else SourceForm.of(folder)
        form: ExportFormat = "float32" if source is None else "source"
        weights = ModelWeights(tensors, model.config)
        write_checkpoint(weights, model.config, place, form, origin="a test", source=source)

    tensors.drive(write)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in tensors.items()}


def largest_bytes(model: DeepSeekV4) -> int:
    return max(t.numel() * t.element_size() for t in model.state_dict().values())


def filled(model: dict[str, object], tmp_path: Path) -> dict[str, object]:
    call = f"{__name__}:rank_main"
    ended = fullweight(json.dumps(model), tmp_path / "out.json", ranks=3, call=call)
    assert ended.ok, ended.output
    found: dict[str, object] = json.loads((tmp_path / "out.json").read_text())
    return found


def counted_alone(work: Callable[[], DeepSeekV4]) -> int:
    with Allocations() as counted:
        model = work()
    del model
    return counted.peak


def test_fresh_weights_on_three_ranks(tmp_path: Path) -> None:
    """Every tensor has `initialise`'s bits; beyond its shards no rank held two of the largest tensors."""
    found = filled({"preset": "tiny", "changes": SIZES}, tmp_path)
    config = DeepSeekV4Config.preset("tiny", **SIZES)
    model = initialise(DeepSeekV4(config), recipe({"preset": "tiny"}).train.seed)
    assert found["hashes"] == hashes(dict(model.state_dict()))
    assert found["sharded"] > 40
    limit = 2 * largest_bytes(model)
    assert max(found["beyond"]) <= limit
    back = load_model(tmp_path / "back")
    assert hashes(dict(back.state_dict())) == found["hashes"]
    assert counted_alone(lambda: initialise(DeepSeekV4(config))) > limit, "a whole model would be noticed"


@pytest.mark.parametrize("layout", ["fp4", pytest.param("base", marks=pytest.mark.slow)])
def test_published_weights_on_three_ranks(layout: str, tmp_path: Path) -> None:
    """The same for a quantised checkpoint, and the receipt accounts for every byte that was read."""
    config = DeepSeekV4Config.preset("tiny", **SIZES)
    folder = write_synthetic(config, tmp_path / "published", layout)
    found = filled({"checkpoint": str(folder)}, tmp_path)
    model = load_model(folder)
    assert found["hashes"] == hashes(dict(model.state_dict()))
    assert max(found["beyond"]) <= 2 * largest_bytes(model)
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    receipt = found["receipt"]
    stored = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            stored[name] = data[start + first : start + last]
    listed = {entry["name"]: entry for entry in receipt["read"]}
    assert listed.keys() == stored.keys()
    assert receipt["totals"]["read"] == {"tensors": len(stored), "bytes": sum(map(len, stored.values()))}
    parted = 0
    for name, entry in listed.items():
        for part in entry["parts"]:
            first, last = part["bytes"]
            assert hashlib.sha256(stored[name][first:last]).hexdigest() == part["sha256"], name
        parted += len(entry["parts"]) > 1
    assert parted > 10, "ranks read parts"
    assert listed["layers.2.ffn.experts.3.w3.weight"]["destination"] == "layers.2.ffn.experts.gate_up[3, 160:320]"
