"""Training from quantised weights, and back to the form in which they were published, which the run has kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests import processes

from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.data.tokenizer import train_tokenizer
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

from .conftest import Command, ledger

DSPARK = {
    "compress_ratios": [0, 4, 128, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 8,
    "dspark_target_layer_ids": [1, 2, 3],
}
RECIPE = """
model.checkpoint = "{folder}/published"
data.tokenizer = "{folder}/tokenizer"
data.row_tokens = 256
method.name = "sft"
optimizer.learning_rate = 1e-3
train.num_steps = 2
eval.num_samples = 0
export.format = "float32"

[[data.sources]]
kind = "synth"
synth = {{ seed = 1, num_samples = 100, mixture = {{ warm-up = 1 }} }}
"""


@pytest.mark.parametrize("dspark", [pytest.param(False, marks=pytest.mark.slow), True], ids=["mtp", "dspark"])
def test_train_from_fp4_and_export_as_fp4(dspark: bool, tmp_path: Path, fullweight: Command) -> None:
    """A recipe names the folder; the run's export goes back to the release's names, shapes, dtypes and shards."""
    config = DeepSeekV4Config.preset("tiny")
    if dspark:
        config = DeepSeekV4Config.from_published({**config.to_published(), **DSPARK})
    published = write_synthetic(config, tmp_path / "published")
    texts = (f"{a} + {b} = {a + b}. True or false?" for a in range(40) for b in range(40))
    train_tokenizer(texts, 448, "deepseek-v4").save(tmp_path / "tokenizer")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    run = tmp_path / "run"
    fullweight("train", tmp_path / "recipe.toml", "--output", run)
    assert ("mtp" in ledger(run)[0]["loss"]) != dspark
    done = fullweight("convert", "export", run, tmp_path / "back")
    assert "by the rule" in done.stdout
    before = {n: t for p in sorted(published.glob("*.safetensors")) for n, t in load_file(p).items()}
    after = {n: t for p in sorted((tmp_path / "back").glob("*.safetensors")) for n, t in load_file(p).items()}
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes()
    receipt = json.loads((tmp_path / "back" / "receipt.json").read_text())
    assert receipt["totals"]["rule_blocks"] > 0, "trained blocks"
    fullweight("convert", "inspect", tmp_path / "back", "--receipt", tmp_path / "back" / "receipt.json")


UNTOUCHED = ['train.trainable=["norm.weight"]', "optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]


def test_a_run_exports_in_the_form_of_its_source(tmp_path: Path) -> None:
    """Two ranks, FP4 in and out: what did not train is the source's bytes, what trained takes the rule.

    The form is the run's own: the source may be gone by then, and a bit that flips in it is found.
    """
    published = write_synthetic(DeepSeekV4Config.preset("tiny"), tmp_path / "published")
    texts = (f"{a} + {b} = {a + b}. True or false?" for a in range(40) for b in range(40))
    train_tokenizer(texts, 448, "deepseek-v4").save(tmp_path / "tokenizer")
    text = (
        RECIPE.format(folder=tmp_path).replace('"float32"', '"source"').replace("num_steps = 2", "num_steps = 4")
    )
    (tmp_path / "recipe.toml").write_text(text)
    run = tmp_path / "run"
    chosen = [
        part
        for setting in (*UNTOUCHED, "train.rows_per_step=2", "train.peak_flops_per_second=1e12")
        for part in ("--set", setting)
    ]
    ended = processes.fullweight("train", tmp_path / "recipe.toml", *chosen, "--output", run, ranks=2)
    assert ended.ok, ended.output
    for path in sorted(published.iterdir()):
        assert (run / "export" / path.name).read_bytes() == path.read_bytes(), path.name
    receipt = json.loads((run / "export" / "receipt.json").read_text())
    assert receipt["totals"]["rule_blocks"] == 0
    assert receipt["totals"]["reused_blocks"] > 1000
    assert receipt["scales_from"] == str(run / "source")
    assert json.loads((run / "import.json").read_text())["totals"]["read"]["tensors"] == len(receipt["written"])
    damaged = run / "source" / "model-00003-of-00007.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    refused = processes.fullweight("resume", run, ranks=2)
    assert refused.statuses == (1, 1)
    assert f"{damaged} is not what was kept" in refused.output
