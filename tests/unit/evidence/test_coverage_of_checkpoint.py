"""Coverage of a run that began from published weights, from `model.checkpoint` to the verdict of a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import fullweight

from fullweight.audit.seal import seal
from fullweight.audit.verify import verify
from fullweight.checkpoint import store
from fullweight.checkpoint.generations import newest
from fullweight.checkpoint.hf import load_weights
from fullweight.checkpoint.manifest import verify as verify_generation
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.data.tokenizer import train_tokenizer
from fullweight.evidence.coverage_report import differences
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4

TINY = DeepSeekV4Config.preset("tiny")
RECIPE = """
model.checkpoint = "{folder}/published"
data.tokenizer = "{folder}/tokenizer"
data.row_tokens = 256
method.name = "sft"
optimizer.learning_rate = 1e-3
schedule.kind = "constant"
train.num_steps = 3
train.peak_flops_per_second = 1e11
eval.num_samples = 0
export.format = "source"

[[data.sources]]
kind = "synth"
synth = {{ seed = 1, num_samples = 300, mixture = {{ warm-up = 1, stops = 2 }} }}
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 weights (`published`), what they were read as (`first.pt`), and a run from them (`run`)."""
    folder = tmp_path_factory.mktemp("begun")
    write_synthetic(TINY, folder / "published")
    read = DeepSeekV4(TINY, ops="reference")
    load_weights(read, folder / "published")
    torch.save(read.state_dict(), folder / "first.pt")
    texts = (f"{a} + {b} = {a + b}. True or false?" for a in range(40) for b in range(40))
    train_tokenizer(texts, 448, "deepseek-v4").save(folder / "tokenizer")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    ended = fullweight("train", folder / "recipe.toml", "--output", folder / "run")
    assert ended.ok, ended.output
    assert "full-parameter: supported" in ended.output
    return folder


def content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_changes_are_since_the_weights_that_were_read(begun: Path) -> None:
    """Counted here from the decoded FP4 weights and the last state; the totals are the parameter count."""
    told = content(begun / "run" / "coverage.json")
    total = TINY.num_parameters(mtp=True)
    assert told["first_weights"]["kind"] == "checkpoint"
    assert told["first_weights"]["known"]
    assert told["parameters"] == {"total": total, "trained": total}
    assert told["totals"]["elements"] == sum(tensor["elements"] for tensor in told["tensors"]) == total
    first = torch.load(begun / "first.pt")
    generation = verify_generation(newest(begun / "run" / "checkpoints"))
    names = [name for name in first if not name.endswith(("gate.bias", "tid2eid"))]
    now = dict(store.stream(generation, [f"model.{name}" for name in names]))
    assert told["totals"]["changed_master"] == sum(int((now[f"model.{n}"] != first[n]).sum()) for n in names)
    assert told["export_compared"]
    assert told["totals"]["changed_export"] < told["totals"]["changed_master"], "FP4 hides small changes"


def test_a_bundle_of_it_holds_while_its_first_weights_are_there(begun: Path, tmp_path: Path) -> None:
    """Coverage is measured again through `verify`; a matrix of the source that changed is not passed over."""
    seal(begun / "run", tmp_path / "bundle")
    report = verify(tmp_path / "bundle", run=begun / "run")
    assert not report.refuted
    held = {finding.rule: finding.status.value for finding in report.findings}
    assert held["coverage.recomputed"] == held["coverage.totals"] == "holds"
    assert next(v.status.value for v in report.verdicts if v.claim == "full-parameter") == "holds"


def test_moved_weights_are_found_again_and_changed_ones_are_not(begun: Path, tmp_path: Path) -> None:
    """Moved, the command needs `--initial`; with a flipped byte nothing of the source is believed."""
    run = tmp_path / "run"
    shutil.copytree(begun / "run", run)
    written = content(run / "coverage.json")
    moved = (begun / "published").rename(tmp_path / "moved")
    try:
        ended = fullweight("coverage", run, "--json", tmp_path / "without.json")
        assert ended.statuses == (3,), ended.output
        assert "--initial" in ended.output
        ended = fullweight("coverage", run, "--initial", moved, "--json", tmp_path / "with.json")
        assert ended.ok, ended.output
        assert differences(written, content(tmp_path / "with.json")) == []
        shutil.copytree(moved, tmp_path / "flipped")
        shard = max((tmp_path / "flipped").glob("*.safetensors"), key=lambda path: path.stat().st_size)
        changed = bytearray(shard.read_bytes())
        changed[len(changed) // 2] ^= 1
        shard.write_bytes(changed)
        ended = fullweight("coverage", run, "--initial", tmp_path / "flipped", "--json", tmp_path / "flipped.json")
        assert not ended.ok
        assert "full-parameter: supported" not in ended.output
        assert "Traceback" not in ended.output
    finally:
        moved.rename(begun / "published")
