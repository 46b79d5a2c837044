"""Published formats through whole folders: values against scalar arithmetic, byte-exact return, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fullweight
from fullweight.checkpoint import hf
from fullweight.checkpoint.export import FolderWeights, write_checkpoint
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.published import INDEX, LAYOUTS, totals
from fullweight.checkpoint.receipt import RECEIPT, compare
from fullweight.checkpoint.shards import ShardReader
from fullweight.checkpoint.source import SOURCE, SourceForm
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import from_published

from .formats import edit, expected_values, tiny, with_drafts

WKV = "layers.1.attn.wkv"
EXPERT = "layers.2.ffn.experts.3.w2"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Synthetic checkpoints by layout; "dspark" is fp4 with draft blocks. Made once each."""
    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            config = with_drafts(tiny()) if layout == "dspark" else tiny()
            folder = tmp_path_factory.mktemp("published") / layout
            made[layout] = write_synthetic(config, folder, "fp4" if layout == "dspark" else layout)
        return made[layout]

    return make


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the receipt."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != RECEIPT}


# ---- the generator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "dspark"])
def test_a_synthetic_checkpoint_is_a_release_in_small(published: Callable[[str], Path], layout: str) -> None:
    """The library reads it; count, bytes, shards and index are the list's; the same seed, the same bytes."""
    folder = published(layout)
    config = DeepSeekV4Config.from_file(folder)
    stored = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    found = totals(config, LAYOUTS["fp4" if layout == "dspark" else layout])
    assert len(stored) == found.tensors
    payload = sum(t.numel() * t.element_size() for t in stored.values())
    assert payload == found.payload_bytes
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == payload
    shards = 2 + 4 + (3 if layout == "dspark" else 1)
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)
    ]
    again = write_synthetic(config, folder.with_name(f"{layout}-again"), layout.replace("dspark", "fp4"))
    assert files(again) == files(folder)


# ---- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "dspark"])
def test_every_value_is_the_one_that_is_stored(published: Callable[[str], Path], layout: str) -> None:
    """The loaded model against scalar dequantisation of the files, bit for bit in fp32."""
    folder = published(layout)
    values = expected_values(folder)
    model = hf.load_model(folder)
    if layout == "dspark":
        assert not model.mtp
        values = {n: v for n, v in values.items() if not n.startswith("mtp.")}
    expected = from_published(values, model.config)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_fullweight_load_and_a_recipe_take_the_folder(published: Callable[[str], Path]) -> None:
    """The public interface gives the model's logits, and the same from every exact format."""
    model = fullweight.load(published("fp4"))
    logits = model.logits([[1, 2, 3]])[0]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, hf.load_model(published("fp4")).logits([[1, 2, 3]])[0])
    aside = fullweight.load(published("dspark")).logits([[1, 2, 3]])[0]
    assert torch.equal(aside, logits), "the trunk of the DSpark checkpoint has the same seed, hence weights"


@pytest.mark.parametrize("layout", ["fp4", "fp8", "base"])
def test_transformers_gives_our_logits(layout: str, tmp_path: Path) -> None:
    """From the quantised folder alone, dequantised by transformers on the CPU, fp32: <= 1e-4.

    Sides are whole blocks: transformers takes a block's size to be the side divided by the number of scales.
    """
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "n_routed_experts": 4}
    config = DeepSeekV4Config.preset("tiny", index_n_heads=32, **sizes)
    folder = write_synthetic(config, tmp_path / layout, layout)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    documents = [list(range(150)), [5], [9, 8, 7]]
    ours = hf.load_model(folder).logits(documents)
    for document, logits in zip(documents, ours, strict=True):
        with torch.no_grad():
            expected = theirs.float()(input_ids=torch.tensor([document]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# ---- there and back -----------------------------------------------------------------------------------


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


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


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


# ---- slices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fp4", "base"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_slices_are_the_whole_and_read_no_more(
    published: Callable[[str], Path], layout: str, dim: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank's part equals that part of the whole; together they read little more than the files hold."""
    folder = published(layout)
    whole = hf.load_model(folder).state_dict()
    counts = [0]
    original = ShardReader._bytes

    def counted(self: ShardReader, start: int, count: int) -> Tensor:
        counts[-1] += count
        return original(self, start, count)

    monkeypatch.setattr(ShardReader, "_bytes", counted)
    for rank in range(ranks):
        counts.append(0)
        slices = {}
        for name, tensor in whole.items():
            cut = min(dim, tensor.dim() - 1)
            size = -(-tensor.shape[cut] // ranks)
            part = tensor.split(size, cut)[rank] if rank < len(tensor.split(size, cut)) else tensor[:0]
            offset = [0] * tensor.dim()
            offset[cut] = rank * size if part.numel() else 0
            slices[name] = hf.Slice(torch.full_like(part, 7), tuple(offset), tuple(tensor.shape))
        hf.load_slices(slices, folder)
        for name, target in slices.items():
            cut = min(dim, whole[name].dim() - 1)
            start = target.offset[cut]
            expected = whole[name].narrow(cut, start, target.tensor.shape[cut])
            if target.tensor.numel():
                assert torch.equal(target.tensor, expected), name
    payload = totals(DeepSeekV4Config.from_file(folder), LAYOUTS[layout]).payload_bytes
    if dim == 0:  # rows: only scales of FP8 blocks that two ranks share are read twice
        assert sum(counts) < 1.02 * payload
        assert max(counts) < 1.3 * payload / ranks
    columns = {"layers.0.attn.wq_a.weight": hf.Slice(torch.zeros(40, 30), (0, 100), (40, 144))}
    hf.load_slices(columns, folder)
    found = columns["layers.0.attn.wq_a.weight"].tensor
    assert torch.equal(found, whole["layers.0.attn.wq_a.weight"][:, 100:130])


def test_peak_memory_is_two_largest_tensors_beyond_the_target(tmp_path: Path) -> None:
    """Import and export of a model whose embedding and head dwarf the rest, in a fresh process (VmHWM)."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's peak of resident memory")
    largest = 98304 * 512 * 2
    script = f"""
        import torch
        from pathlib import Path
        from fullweight.checkpoint import hf
        from fullweight.checkpoint.source import SourceForm
        from fullweight.checkpoint.synthetic import write_synthetic
        from fullweight.models.deepseek_v4.config import DeepSeekV4Config
        from fullweight.models.deepseek_v4.model import DeepSeekV4
        torch.set_num_threads(1)

        def status(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

        config = DeepSeekV4Config.preset("tiny", vocab_size=98304, hidden_size=512, num_hash_layers=0)
        folder = write_synthetic(config, {str(tmp_path / "m")!r})
        small = DeepSeekV4Config.preset("tiny")
        hf.load_model(write_synthetic(small, {str(tmp_path / "s")!r}))  # libraries and kernels are in
        model = DeepSeekV4(config)
        for tensor in model.state_dict().values():
            tensor.fill_(1)

        def extra(work):
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            work()
            return status("VmHWM") - before

        source = SourceForm.of(folder)
        print(extra(lambda: hf.load_weights(model, folder)))
        print(extra(lambda: hf.export_checkpoint(model, {str(tmp_path / "o")!r}, "source", source=source)))
    """
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    for extra in map(int, done.stdout.split()):
        assert extra <= 2 * largest, f"{extra:,} bytes beyond the target, largest tensor {largest:,}"


# ---- refusals -----------------------------------------------------------------------------------------


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
