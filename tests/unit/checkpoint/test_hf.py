"""Checkpoint folders: transformers reads ours, ours come back, and nothing wrong or half-written passes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fullweight.checkpoint.hf import INDEX, ExportFormat, export_checkpoint, load_model
from fullweight.core.errors import CheckpointError, ConfigError, FullweightError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4

DOCUMENTS = [list(range(150)), [5], [9, 8, 7], list(range(100, 140))]


def _model(**changes: object) -> DeepSeekV4:
    """A tiny model whose every tensor differs from its fresh value."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny", index_n_heads=32, **changes))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.rand(512, 8, generator=generator).argsort(-1)[:, :2])
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "_scale")):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() > 1 and not name.endswith("ape"):
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(0.3 * noise)
    return model


def _hf_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return loaded


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_an_export(tmp_path: Path, dtype: ExportFormat) -> None:
    """From the folder alone transformers gives, in fp32, the logits that we give from it (<= 1e-4)."""
    folder = export_checkpoint(_model(), tmp_path / "model", dtype)
    ours = load_model(folder).logits(DOCUMENTS)
    theirs = _hf_model(folder)
    for document, logits in zip(DOCUMENTS, ours, strict=True):
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([document]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_float32_export_returns_every_bit(tmp_path: Path) -> None:
    """Export then import is the identity, MTP, buffers and tables included."""
    model = _model()
    back = load_model(export_checkpoint(model, tmp_path / "model", "float32"))
    expected, found = model.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert back.config.model_copy(update={"extra": {}}) == model.config


def test_bfloat16_export_keeps_fp32_where_the_release_does(tmp_path: Path) -> None:
    """Hyper-connections, sinks, position and router biases are fp32, tables int64, all else bf16."""
    model = _model()
    folder = export_checkpoint(model, tmp_path / "model")
    dtypes = {n: t.dtype for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
    for name, dtype in dtypes.items():
        wide = "hc_" in name or name.endswith(("attn_sink", "ape", "gate.bias"))
        expected = torch.int64 if name.endswith("tid2eid") else torch.float32 if wide else torch.bfloat16
        assert dtype == expected, name
    back = load_model(folder).state_dict()
    for name, tensor in model.state_dict().items():
        wide = "hc_" in name or name.endswith(("attn_sink", "ape", "gate.bias", "tid2eid"))
        assert torch.equal(back[name], tensor if wide else tensor.bfloat16().float()), name
    again = export_checkpoint(load_model(folder), tmp_path / "again")
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_shards_and_index_follow_the_release(tmp_path: Path) -> None:
    """Embedding, one shard a layer, head, MTP; the index names every tensor and the exact bytes."""
    folder = export_checkpoint(_model(), tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
    found = {n: p for p in names for n in load_file(folder / p)}
    assert index["weight_map"] == found
    assert found["embed.weight"] == names[0]
    assert found["layers.2.attn.wkv.weight"] == names[3]
    assert {found[n] for n in ("head.weight", "norm.weight", "hc_head_fn")} == {names[5]}
    assert {p for n, p in found.items() if n.startswith("mtp.")} == {names[6]}
    payload = sum(t.numel() * t.element_size() for p in names for t in load_file(folder / p).values())
    assert index["metadata"]["total_size"] == payload
    for name in names:
        with safe_open(folder / name, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["compress_ratios"] == [0, 4, 128, 4, 0]
    assert "quantization_config" not in config


def test_export_of_a_released_architecture_is_not_called_quantised(tmp_path: Path) -> None:
    """config.json says what the folder holds: no quantisation and no draft blocks; other keys stay."""
    extra = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4", "dspark_block_size": 5, "x": 1}
    config = json.loads((export_checkpoint(_model(extra=extra), tmp_path / "m") / "config.json").read_text())
    assert "quantization_config" not in config
    assert "expert_dtype" not in config
    assert "dspark_block_size" not in config
    assert config["x"] == 1


def test_export_adds_the_tokenizer(tmp_path: Path) -> None:
    """The tokenizer's files are part of the folder before it gets its name."""
    folder = export_checkpoint(_model(), tmp_path / "m", write_tokenizer=lambda p: _touch(p / "tokenizer.json"))
    assert (folder / "tokenizer.json").read_text() == "{}"


def _touch(path: Path) -> None:
    path.write_text("{}", encoding="utf-8")


def test_export_refuses_a_folder_in_use(tmp_path: Path) -> None:
    """Files that are already there are never mixed with or overwritten; an empty folder is taken."""
    (tmp_path / "used").mkdir()
    _touch(tmp_path / "used" / "notes.txt")
    with pytest.raises(CheckpointError, match="not empty"):
        export_checkpoint(_model(), tmp_path / "used")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert load_model(export_checkpoint(_model(), tmp_path / "empty"))


def test_export_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    """A path that is a file is the user's mistake: one message, the file untouched."""
    _touch(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a file"):
        export_checkpoint(_model(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "{}"


def test_export_refuses_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a rename onto it would fail after everything was written."""
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(CheckpointError, match=r"is a mount point, .* name a folder in it"):
        export_checkpoint(_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """When the last file cannot be written, neither the folder nor its staging place remains."""

    def no_space(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space"):
        export_checkpoint(_model(), tmp_path / "model", write_tokenizer=no_space)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    """A file system that takes no more (here: a limit on file size) gives a CheckpointError, and no folder."""
    script = f"""
        import resource
        from fullweight.checkpoint.hf import export_checkpoint
        from fullweight.core.errors import CheckpointError
        from fullweight.models.deepseek_v4.config import DeepSeekV4Config
        from fullweight.models.deepseek_v4.init import initialise
        from fullweight.models.deepseek_v4.model import DeepSeekV4
        model = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny"), ops="reference"), 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            export_checkpoint(model, {str(tmp_path / "m")!r})
        except CheckpointError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True
    )
    assert "could not write" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [1, 4, 8])
def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path, files: int) -> None:
    """SIGKILL after some files: the named folder does not exist, and what remains is hidden and refused."""
    script = f"""
        import os, signal
        from pathlib import Path
        from fullweight.checkpoint import hf
        from fullweight.checkpoint.receipt import Receipt
        from fullweight.checkpoint.shards import ShardWriter
        from fullweight.models.deepseek_v4.config import DeepSeekV4Config
        from fullweight.models.deepseek_v4.init import initialise
        from fullweight.models.deepseek_v4.model import DeepSeekV4
        written = 0
        def dying(original):
            def write(*args, **kwargs):
                global written
                original(*args, **kwargs)
                written += 1
                if written == {files}:
                    os.kill(os.getpid(), signal.SIGKILL)
            return write
        ShardWriter.finish, Receipt.write = dying(ShardWriter.finish), dying(Receipt.write)
        model = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny")), 0)
        hf.export_checkpoint(model, Path({str(tmp_path / "m")!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=os.environ.copy())
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_model(tmp_path / "m")
    with pytest.raises(FullweightError):
        load_model(left[0])
    # the same export succeeds afterwards
    assert load_model(export_checkpoint(_model(), tmp_path / "m"))


# ---- import refuses -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(_model(), tmp_path_factory.mktemp("export") / "model")


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def _edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the shard that holds tensor `name`, and the index to match."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][name]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    kept = {n: f for n, f in index["weight_map"].items() if f != file}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(tensors, file)}}))


def _narrow(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def _as_float8(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)


def _as_packed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] // 2, dtype=torch.int8)


def _as_integers(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int64)


def _beyond_the_experts(tensors: dict[str, Tensor]) -> None:
    tensors[TABLE][17, 1] = 8


WKV = "layers.1.attn.wkv.weight"
TABLE = "layers.0.ffn.gate.tid2eid"
EXPERT = "layers.2.ffn.experts.3.w2.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WKV, lambda t: t.pop(WKV), WKV),
        (EXPERT, lambda t: t.pop(EXPERT), EXPERT),
        ("mtp.0.e_proj.weight", lambda t: t.pop("mtp.0.e_proj.weight"), "mtp.0.e_proj.weight"),
        (WKV, lambda t: t.update({"layers.1.attn.wkv.bias": torch.zeros(3)}), "layers.1.attn.wkv.bias"),
        (WKV, lambda t: _narrow(t, WKV), rf"{WKV}.*\[31, 64\].*\[32, 64\]"),
        (WKV, lambda t: _as_float8(t, WKV), f"{WKV}.*float8"),
        (EXPERT, lambda t: _as_packed(t, EXPERT), f"{EXPERT}.*int8"),
        (EXPERT, lambda t: _narrow(t, EXPERT), rf"{EXPERT}.*\[63, 32\].*\[64, 32\]"),
        (WKV, lambda t: _as_integers(t, WKV), f"{WKV}.*int64"),
        (TABLE, _beyond_the_experts, f"{TABLE}.*0 to 7"),
    ],
)
def test_a_wrong_tensor_is_named(
    exported: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    """Missing, unexpected, misshapen, quantised or out of range: the message has the published name."""
    folder = _copy(exported, tmp_path / "copy")
    _edit(folder, name, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named(exported: Path, tmp_path: Path, keep: float) -> None:
    """A file cut anywhere is refused with its name."""
    folder = _copy(exported, tmp_path / "copy")
    shard = folder / "model-00003-of-00007.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="model-00003-of-00007"):
        load_model(folder)


def test_a_corrupt_header_is_named(exported: Path, tmp_path: Path) -> None:
    """A header that is not JSON is refused with the file's name."""
    folder = _copy(exported, tmp_path / "copy")
    shard = folder / "model-00002-of-00007.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:40] = b"\xff" * 32
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="model-00002-of-00007"):
        load_model(folder)


def test_a_missing_shard_is_named(exported: Path, tmp_path: Path) -> None:
    """The index says what should be there."""
    folder = _copy(exported, tmp_path / "copy")
    (folder / "model-00004-of-00007.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00004-of-00007"):
        load_model(folder)


def test_weights_without_an_index_load(exported: Path, tmp_path: Path) -> None:
    """A folder of shards, or a single file, needs no index."""
    folder = _copy(exported, tmp_path / "copy")
    expected = load_model(folder).state_dict()
    (folder / INDEX).unlink()
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    merged = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(merged, folder / "model.safetensors")
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "\x00"])
def test_a_damaged_index_is_named(exported: Path, tmp_path: Path, content: str) -> None:
    """An index that is no index is refused by name, not by a traceback."""
    folder = _copy(exported, tmp_path / "copy")
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        load_model(folder)


def test_an_index_cannot_point_outside_its_folder(exported: Path, tmp_path: Path) -> None:
    """A file name with a path in it is refused: an index is data from elsewhere."""
    folder = _copy(exported, tmp_path / "copy")
    (tmp_path / "other.safetensors").write_bytes((folder / "model-00001-of-00007.safetensors").read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["embed.weight"] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="other"):
        load_model(folder)


def test_another_models_checkpoint_is_refused(exported: Path, tmp_path: Path) -> None:
    """Another family by its model_type; another size of ours by the first tensor that disagrees."""
    folder = _copy(exported, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn.*expected"):
        load_model(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]})
    )
    with pytest.raises(CheckpointError, match=r"layers\.3"):
        load_model(folder)


def test_an_absent_or_empty_folder_is_refused(tmp_path: Path) -> None:
    """No folder, no config.json, no weights: each says what is missing."""
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DeepSeekV4Config.preset("tiny").to_published()))
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(tmp_path)


def test_non_finite_weights_come_through_as_they_are(tmp_path: Path) -> None:
    """Import does not mend or hide values: NaN stays NaN in the one place where it was."""
    model = _model()
    with torch.no_grad():
        model.head.weight[3, 5] = float("nan")
    back = load_model(export_checkpoint(model, tmp_path / "m", "float32"))
    assert back.head.weight.isnan().nonzero().tolist() == [[3, 5]]
