"""Published formats there and back: byte for byte where nothing changed, by the rule where something did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fullweight.checkpoint import hf
from fullweight.checkpoint.export import FolderWeights, write_checkpoint
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.published import LAYOUTS, totals
from fullweight.checkpoint.receipt import RECEIPT, compare
from fullweight.checkpoint.source import SOURCE, SourceForm
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.core.errors import CheckpointError

from .formats import EXPERT, WKV, copy, edit, files, raw, tiny


@pytest.mark.parametrize("layout", [*LAYOUTS, "dspark"])
def test_an_untouched_model_returns_byte_for_byte(
    published: Callable[[str], Path], layout: str, tmp_path: Path
) -> None:
    """Through fp32 masters and out in the source's form: every file equal, drafts and headers included."""
    folder = published(layout)
    model, source = hf.load_model(folder), SourceForm.of(folder)
    out = hf.export_checkpoint(model, tmp_path / "back", "source", source=source)
    assert files(out) == files(folder)
    receipt = json.loads((out / RECEIPT).read_text())
    assert receipt["totals"]["rule_blocks"] == 0
    assert receipt["totals"]["inexact_tensors"] == 0
    assert (receipt["totals"]["reused_blocks"] > 0) == source.catalogue.is_quantised


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["fp4", "base", "bfloat16", "dspark"])
def test_an_import_returns_byte_for_byte(
    published: Callable[[str], Path], layout: str, dtype: hf.ExportFormat, tmp_path: Path
) -> None:
    """Through a plain folder that keeps its source's form, without the source itself."""
    folder = copy(published(layout), tmp_path / "moved")
    with PublishedFolder(folder, hashing=True) as opened:
        weights, form = FolderWeights(opened), SourceForm.of_folder(opened)
        write_checkpoint(weights, opened.config, tmp_path / "plain", dtype, origin="x", keep_source=form)
    expected = files(folder)
    shutil.rmtree(folder)
    kept = SourceForm.of(tmp_path / "plain")
    assert kept.path == tmp_path / "plain" / SOURCE
    with PublishedFolder(tmp_path / "plain") as opened:
        weights = FolderWeights(opened)
        write_checkpoint(weights, opened.config, tmp_path / "back", "source", origin="x", source=kept)
    assert files(tmp_path / "back") == expected


def test_a_trained_value_costs_its_block_alone(published: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks with other values take the rule and are counted; every other stored byte stays."""
    folder = published("fp4")
    model = hf.load_model(folder)
    with torch.no_grad():
        model.layers[2].ffn.experts.down[3, 5, 40] = 1.0
        model.layers[1].attn.wkv.weight[0, 0] *= 1.5
    source = SourceForm.of(folder)
    out = hf.export_checkpoint(model, tmp_path / "out", "source", source=source)
    receipt = json.loads((out / RECEIPT).read_text())
    changed = {e["name"]: e for e in receipt["written"] if e["rule_blocks"]}
    assert changed.keys() == {f"{EXPERT}.weight", f"{WKV}.weight"}
    assert receipt["totals"]["rule_blocks"] == 2
    assert changed[f"{EXPERT}.weight"]["max_error"] > 0
    before = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    after = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    assert before.keys() == after.keys()
    unequal = {n for n in before if not torch.equal(raw(before[n]), raw(after[n]))}
    allowed = {f"{n}.{part}" for n in (EXPERT, WKV) for part in ("weight", "scale")}
    assert {f"{EXPERT}.weight"} <= unequal <= allowed
    # decoding what was written is as far from the trained values as the receipt says
    found = hf.load_model(out).layers[2].ffn.experts.down[3]
    error = float((found - model.layers[2].ffn.experts.down[3]).abs().max().detach())
    assert error == pytest.approx(changed[f"{EXPERT}.weight"]["max_error"])


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_a_model_without_source_is_written_by_the_rule(form: hf.ExportFormat, tmp_path: Path) -> None:
    """Names, shapes and dtypes of the layout; config.json says so; values within half a code of the model's."""
    model = hf.load_model(write_synthetic(tiny(), tmp_path / "plain", "bfloat16"))
    out = hf.export_checkpoint(model, tmp_path / form, form)
    config = json.loads((out / "config.json").read_text())
    assert config["expert_dtype"] == form
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    with PublishedFolder(out) as opened:
        storages = {t.storage for t in opened.catalogue.tensors.values()}
        assert storages == {"BF16", "F32", "F8_E4M3", "I64"} | ({"FP4"} if form == "fp4" else set())
    back, relative = hf.load_model(out).state_dict(), {"fp4": 0.15, "fp8": 0.035}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up", "down")):
            bound = relative["fp4" if form == "fp4" and ".experts." in name else "fp8"]
            assert float((back[name] - tensor).norm() / tensor.norm()) < bound, name
    # what was quantised once is exact the second time, with its own scales or without
    again = hf.export_checkpoint(hf.load_model(out), tmp_path / "again", "source", source=SourceForm.of(out))
    assert files(again) == files(out)


def test_fp8_under_the_sources_scales_where_the_format_stays(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    """FP4 in, FP8 out: attention keeps its bytes, experts are FP8 by the rule."""
    folder = published("fp4")
    out = hf.export_checkpoint(hf.load_model(folder), tmp_path / "o", "fp8", source=SourceForm.of(folder))
    before = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    after = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    for part in ("weight", "scale"):
        assert torch.equal(raw(after[f"{WKV}.{part}"]), raw(before[f"{WKV}.{part}"]))
    assert after[f"{EXPERT}.weight"].dtype == torch.float8_e4m3fn
    written = {e["name"]: e for e in json.loads((out / RECEIPT).read_text())["written"]}
    assert written[f"{WKV}.weight"]["rule_blocks"] == 0
    assert written[f"{EXPERT}.weight"]["reused_blocks"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_own_names(published: Callable[[str], Path], dtype: hf.ExportFormat, tmp_path: Path) -> None:
    """Under its own names transformers finds all and nothing else, and gives our logits."""
    from transformers import AutoModelForCausalLM

    model = hf.load_model(published("fp4"))
    out = hf.export_checkpoint(model, tmp_path / "theirs", dtype, names="transformers")
    names = {n for p in out.glob("*.safetensors") for n in load_file(p)}
    assert "model.layers.2.mlp.experts.gate_up_proj" in names
    assert not any("mtp" in n for n in names)
    left_out = json.loads((out / RECEIPT).read_text())["left_out"]
    assert all(item["name"].startswith("mtp.0.") for item in left_out)
    assert left_out
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert names <= theirs.state_dict().keys(), "names are its own, not ones that it maps"
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([list(range(150))]), use_cache=False).logits[0]
    torch.testing.assert_close(model.logits([list(range(150))])[0], expected, rtol=0, atol=1e-4)


def test_copies_of_shared_weights_are_ignored_and_written_back(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    """An MTP block that carries the embedding and head loads, is receipted, and comes back with them."""
    folder = copy(published("fp4"), tmp_path / "copy")
    shared = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    copies = {"mtp.0.emb.tok_emb.weight": shared["embed.weight"], "mtp.0.head.weight": shared["head.weight"]}
    edit(folder, "mtp.0.norm.weight", lambda tensors: tensors.update(copies))
    out = hf.export_checkpoint(hf.load_model(folder), tmp_path / "o", "source", source=SourceForm.of(folder))
    assert files(out) == files(folder)


def test_a_foreign_source_is_refused(published: Callable[[str], Path], tmp_path: Path) -> None:
    """Scales of another model are not applied."""
    other = write_synthetic(tiny(n_routed_experts=3), tmp_path / "other")
    with pytest.raises(CheckpointError, match="another model"):
        hf.export_checkpoint(
            hf.load_model(published("fp4")), tmp_path / "o", "source", source=SourceForm.of(other)
        )
    with pytest.raises(CheckpointError, match="--source"):
        hf.export_checkpoint(hf.load_model(published("fp4")), tmp_path / "o", "source")
    assert not (tmp_path / "o").exists()


def test_a_receipt_lists_every_tensor_and_tells_folders_apart(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    """Hashes by another route; a flipped bit, a lost and an added tensor are found by comparing."""
    import hashlib

    folder = published("dspark")
    with PublishedFolder(folder, hashing=True) as opened:
        form = SourceForm.of_folder(opened)
        write_checkpoint(
            FolderWeights(opened), opened.config, tmp_path / "i", "bfloat16", origin="dspark", keep_source=form
        )
    receipt = json.loads((tmp_path / "i" / RECEIPT).read_text())
    stored = {n: (p.name, t) for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    read = {entry["name"]: entry for entry in receipt["read"]}
    assert read.keys() == stored.keys()
    for name, (file, tensor) in stored.items():
        assert read[name]["file"] == file
        assert read[name]["sha256"] == hashlib.sha256(raw(tensor).numpy().tobytes()).hexdigest(), name
        assert read[name]["bytes"] == tensor.numel() * tensor.element_size()
        aside = read[name]["destination"].startswith("kept aside")
        assert aside == name.startswith("mtp.")
    assert read[f"{EXPERT}.weight"]["parameter"] == "layers.2.ffn.experts.down[3, 0:144]"
    assert receipt["missing"] == receipt["left_over"] == []
    assert receipt["totals"]["read"]["bytes"] == totals(opened.config).payload_bytes
    with PublishedFolder(tmp_path / "i", hashing=True) as opened:
        assert compare(opened, tmp_path / "i" / RECEIPT) == len(receipt["written"])
    victim = tmp_path / "i" / "model-00003-of-00006.safetensors"
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    with (
        PublishedFolder(tmp_path / "i", hashing=True) as opened,
        pytest.raises(CheckpointError, match=r"differs from .* in layers\.1\."),
    ):
        compare(opened, tmp_path / "i" / RECEIPT)
