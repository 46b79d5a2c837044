"""What a forger can do to files beside the ledger: figures, checkpoints, export, coverage, data. Each is caught by
the rule that is meant, also where list, chain, figures and claims were made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.audit.conftest import Honest, train
from tests.unit.audit.forging import Entry, Forgery, named, refuted, steps

from fullweight.audit.seal import seal
from fullweight.audit.verify import verify, verify_together
from fullweight.evidence.bundle import RefusedError


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("performance.json", lambda p: p["mfu"].update(overall=0.55), "performance.recomputed"),
        ("performance.json", lambda p: p["goodput"].update(share=0.99), "performance.recomputed"),
        ("evaluation.json", lambda e: e[-1]["loss"].update(lm=0.1), "evaluation.recomputed"),
        ("claims.json", lambda c: c[3].update(value=10**9), "claim:tokens"),
        ("claims.json", lambda c: c[0].update(statement="the run is the best"), "claim:steps"),
        ("checkpoints.json", lambda c: c[0].update(state_root="0" * 64), "checkpoint.roots"),
    ],
)
def test_a_stated_figure_is_computed_again(
    name: str, change: Callable[[Any], Any], rule: str, honest: Honest, tmp_path: Path
) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit(name, change)
    forgery.relist()
    assert rule in refuted(verify(forgery.root, run=honest.run))


def _weights_edited(run: Path) -> None:
    """A shard with other bytes, and a manifest that fits it."""
    folder = run / "checkpoints" / "step-6"
    [shard] = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    _reseal(folder, {shard.name: hashlib.sha256(bytes(content)).hexdigest()})


def _reseal(folder: Path, digests: dict[str, str]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in digests.items():
        manifest["files"][name]["sha256"] = digest
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / "manifest.json").write_text(text)
    sealed = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.sha256").write_text(f"{sealed}  manifest.json\n")


def test_a_rebuilt_checkpoint_is_not_the_recorded_one(honest: Honest, tmp_path: Path) -> None:
    """Weights edited after training, sealed again: intact by itself, and not what the ledger speaks of."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    _weights_edited(forgery.run)
    assert "checkpoint.bytes" in refuted(verify(forgery.root, run=forgery.run))


def test_a_rebuilt_checkpoint_and_a_new_ledger(honest: Honest, tmp_path: Path) -> None:
    """The ledger's line names the rebuilt checkpoint, chained anew: its state has another root than was stated."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    _weights_edited(forgery.run)
    source = forgery.run / "checkpoints" / "step-6" / "manifest.json"
    shutil.copy(source, forgery.root / "checkpoints" / "step-6" / "manifest.json")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    forgery.edit("checkpoints.json", lambda c: c[-1].update(manifest_sha256=digest))
    forgery.edit_lines(lambda lines: named(lines, "checkpoint")[-1].update(manifest_sha256=digest))
    assert "checkpoint.roots" in refuted(verify(forgery.root, run=forgery.run))


def test_a_checkpoint_of_another_run(honest: Honest, again: Path, tmp_path: Path) -> None:
    """Same recipe, another run: its manifest names another ledger."""
    forgery = Forgery(honest.bundle, tmp_path)
    source = again / "checkpoints" / "step-6" / "manifest.json"
    shutil.copy(source, forgery.root / "checkpoints" / "step-6" / "manifest.json")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    forgery.edit("checkpoints.json", lambda c: c[-1].update(manifest_sha256=digest))
    forgery.edit_lines(lambda lines: named(lines, "checkpoint")[-1].update(manifest_sha256=digest))
    assert "checkpoint.ledger" in refuted(verify(forgery.root))


def test_the_same_run_twice_is_not_two_runs(honest: Honest, again: Path, tmp_path: Path) -> None:
    """A run repeated with its seed: another run by name, no second sample."""
    seal(again, tmp_path / "bundle")
    reports = verify_together([honest.bundle, tmp_path / "bundle"])
    assert all("seeds" in refuted(report)["bundles.seeds"] for report in reports)
    assert "2 times" in refuted(verify_together([honest.bundle, honest.bundle])[0])["bundles.seeds"]


def test_a_missing_rank(honest: Honest, tmp_path: Path) -> None:
    """A run that says it had two ranks, and whose checkpoints one rank wrote."""
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_manifest(lambda m: m["layout"].update(ranks=2))
    assert "checkpoint.ranks" in refuted(verify(forgery.root))


def test_edited_exported_weights(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    shard = sorted((forgery.run / "export").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})
    assert name in refuted(verify(forgery.root, run=forgery.run))["export.bytes"]


def test_an_adapter_is_no_export(honest: Honest, tmp_path: Path) -> None:
    """Only what an adapter would hold is left of the weights."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    for shard in sorted((forgery.run / "export").glob("*.safetensors")):
        tensors = load_file(shard)
        save_file({n: t for n, t in tensors.items() if "wq_a" in n}, shard, metadata={"format": "pt"})
    (forgery.run / "export" / "model.safetensors.index.json").unlink()
    assert "export.complete" in refuted(verify(forgery.root, run=forgery.run))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda c: c["parameters"].update(trained=1), "coverage.totals"),
        (lambda c: c.update(generation="step-3"), "coverage.totals"),
        (lambda c: c["tensors"][3].update(elements=1), "coverage.totals"),
        (lambda c: c["totals"].update(elements=c["totals"]["elements"] - 1), "coverage.recomputed"),
        (lambda c: c["claim"].update(full_parameter="refuted"), "coverage.recomputed"),
    ],
)
def test_coverage_is_measured_again(
    change: Callable[[Any], Any], rule: str, honest: Honest, tmp_path: Path
) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("coverage.json", change)
    forgery.restate()
    assert rule in refuted(verify(forgery.root, run=honest.run))


def _data_of(run: Path, change: Callable[[Any], None]) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config["data"])
    (run / "config.json").write_text(json.dumps(config))


def test_other_data_than_the_manifest_fixed(honest: Honest, tmp_path: Path) -> None:
    """Other samples under the same recipe: neither roots nor batches are those of the run."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    _data_of(forgery.run, lambda data: data["sources"][0]["synth"].update(seed=9))
    found = refuted(verify(forgery.root, run=forgery.run, with_data=True))
    assert {"data.samples", "data.batches", "data.held-out"} <= found.keys()


def test_a_dropped_batch(honest: Honest, tmp_path: Path) -> None:
    """Every step from the third on saw the batch of the one after it."""

    def change(lines: list[Entry]) -> None:
        mine = steps(lines)
        for step, after in pairwise(mine[2:]):
            step["batch"]["digest"] = after["batch"]["digest"]

    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_lines(change)
    found = refuted(verify(forgery.root, run=honest.run, with_data=True))
    assert "step 3" in found["data.batches"]


def test_evaluation_on_training_samples(honest: Honest, tmp_path: Path) -> None:
    """Every evaluation names the ids of training samples, and all agree."""
    forgery = Forgery(honest.bundle, tmp_path)
    digest = hashlib.sha256(json.dumps(["train-1"]).encode()).hexdigest()

    def change(lines: list[Entry]) -> None:
        for line in lines:
            if line["kind"] == "eval":
                line["samples"] = digest

    forgery.edit_lines(change)
    found = refuted(verify(forgery.root, run=honest.run, with_data=True))
    assert "data.held-out" in found
    assert "evaluation.samples" not in found


def test_a_changed_data_file(tmp_path: Path) -> None:
    """One answer changed after training."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": str(2 * i)}]}
        for i in range(100)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f'[{{kind = "file", path = "{data}"}}]'
    run = train(tmp_path / "run", data__sources=source, train__num_steps=2, tokenizer__num_samples=80)
    seal(run, tmp_path / "bundle")
    assert not verify(tmp_path / "bundle", run=run, with_data=True).refuted
    data.write_text(data.read_text().replace('"198"', '"199"'))
    found = refuted(verify(tmp_path / "bundle", run=run, with_data=True))
    assert str(data) in found["data.files"]


def test_a_bundle_cut_short_is_refused(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    (forgery.root / "model.json").unlink()
    with pytest.raises(RefusedError, match=r"bundle\.complete: model\.json is not there"):
        verify(forgery.root)
