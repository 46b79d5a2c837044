"""What is loaded from a published format: values against scalar arithmetic, logits against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fullweight
from fullweight.checkpoint import hf
from fullweight.checkpoint.published import INDEX, LAYOUTS, totals
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import from_published

from .formats import expected_values, files


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
