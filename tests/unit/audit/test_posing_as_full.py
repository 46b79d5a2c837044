"""Runs that trained less than everything and are passed off as full-parameter training, from run to verdict.

What was done is done by the program that trains (`cheating.py`), so ledger, chain, checkpoints, export and claims
are as a whole run leaves them. The forger then makes coverage.json what an honest run's would be and seals.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.unit.audit.cheating import ADAPTED, MATRIX
from tests.unit.audit.conftest import Honest, train
from tests.unit.audit.forging import Forgery, named, refuted, steps

from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.verify import Report, verify
from fullweight.checkpoint.hf import export_checkpoint
from fullweight.checkpoint.receipt import RECEIPT
from fullweight.evidence.performance import CONVENTION, FROZEN_CONVENTION
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

SHORT = {"train__num_steps": 3, "eval__num_samples": 0}
SHORT |= {"eval__every": 100, "train__precision": "fp32", "schedule__kind": "constant"}
COUNTS = ("reached", "changed_master", "changed_bf16", "changed_export")


def whitewash(run: Path) -> None:
    """What an honest run's coverage.json says: no finding against it, every tensor reached and changed."""
    content = json.loads((run / "coverage.json").read_text())
    assert content["claim"]["full_parameter"] == "refuted", "the run itself says so"
    content["claim"]["full_parameter"] = "supported"
    content["findings"] = [found for found in content["findings"] if found["weight"] != "refutes"]
    for tensor in content["tensors"]:
        if tensor["changed_master"] == 0:
            tensor.update(dict.fromkeys(COUNTS, tensor["elements"]), l2_change=1.0, largest_change=0.1)
        if (rank := tensor["rank"]) is not None:
            rank.update(rank=None, residual=0.5)
    (run / "coverage.json").write_text(json.dumps(content))


def claimed(report: Report) -> Status:
    return next(verdict.status for verdict in report.verdicts if verdict.claim == "full-parameter")


@pytest.mark.parametrize(
    ("cheat", "code", "names"), [("freeze", "frozen_tensor", (MATRIX,)), ("adapt", "low_rank", ADAPTED)]
)
def test_a_run_that_trained_less_is_not_full(
    cheat: str, code: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Sealed as it is the claim is not made; passed off as full it is refuted, with the matrices by name."""
    run = train(tmp_path / "run", call=f"tests.unit.audit.cheating:{cheat}", **SHORT)
    seal(run, tmp_path / "told")
    told = verify(tmp_path / "told", run=run)
    assert claimed(told) is Status.not_checkable, "no claim is made that the run is against"
    assert not told.refuted
    whitewash(run)
    seal(run, tmp_path / "forged")
    report = verify(tmp_path / "forged", run=run)
    found = refuted(report)
    assert found.keys() == {"coverage.recomputed", "claim:full-parameter"}
    assert f"measured again: {code}: " in found["coverage.recomputed"]
    assert all(name in found["coverage.recomputed"] for name in names)


def test_a_run_with_frozen_parameters_is_what_it_says(tmp_path: Path) -> None:
    """Its FLOPs are counted again, by the patterns of its recipe; passed off as full it contradicts them."""
    run = train(tmp_path / "run", train__frozen='["*.experts.*", "embed.weight"]', **SHORT)
    seal(run, tmp_path / "bundle")
    report = verify(tmp_path / "bundle", run=run)
    held = {finding.rule: finding.status for finding in report.findings}
    assert not report.refuted
    assert held["ledger.flops"] is held["ledger.parameters"] is Status.holds
    figures = json.loads((tmp_path / "bundle" / "performance.json").read_text())["mfu"]
    assert figures["convention"] == FROZEN_CONVENTION
    assert figures["overall"] > 0

    def full(lines: list[dict[str, Any]]) -> None:
        for step in steps(lines):
            step["parameters"]["trained"] = step["parameters"]["total"]
            step["mfu_convention"] = CONVENTION
            step["model_flops_per_second"] *= 3
            step["mfu"] *= 3

    (tmp_path / "forged").mkdir()
    forgery = Forgery(tmp_path / "bundle", tmp_path / "forged")
    forgery.edit_lines(full)
    forgery.edit_manifest(lambda m: m["parameters"].update(trained=m["parameters"]["total"]))
    found = refuted(verify(forgery.root))
    assert {"ledger.flops", "ledger.parameters", "checkpoint.ledger"} <= found.keys()
    assert "the recipe trains" in found["ledger.parameters"]


def test_an_adapter_as_the_export_is_no_model(honest: Honest, tmp_path: Path) -> None:
    """Only what an adapter holds is left of the weights, with a receipt that the ledger names."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    for shard in sorted((forgery.run / "export").glob("*.safetensors")):
        kept = {n: t for n, t in load_file(shard).items() if "wq_a" in n}
        shard.unlink()
        if kept:
            save_file(kept, shard, metadata={"format": "pt"})
    (forgery.run / "export" / "model.safetensors.index.json").unlink()
    receipt = json.loads((forgery.run / "export" / RECEIPT).read_text())
    receipt["written"] = [entry for entry in receipt["written"] if "wq_a" in entry["name"]]
    _bind(forgery, json.dumps(receipt).encode())
    assert "export.complete" in refuted(verify(forgery.root, run=forgery.run))


def test_the_first_weights_as_the_export_are_found(honest: Honest, tmp_path: Path) -> None:
    """What training adapters leaves of a model: the base as it was, exported whole, with the right receipt."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    assert forgery.run is not None
    shutil.rmtree(forgery.run / "export")
    config = DeepSeekV4Config.from_file(forgery.run / "model.json")
    seed = json.loads((forgery.run / "config.json").read_text())["train"]["seed"]
    export_checkpoint(initialise(DeepSeekV4(config, ops="reference"), seed), forgery.run / "export")
    _bind(forgery, (forgery.run / "export" / RECEIPT).read_bytes())
    found = refuted(verify(forgery.root, run=forgery.run))
    assert "export.bytes" not in found, "every tensor has the digest of the receipt, which the ledger names"
    assert "export.complete" not in found
    assert "exported as the run began" in found["coverage.recomputed"]


def _bind(forgery: Forgery, receipt: bytes) -> None:
    """Let the ledger name another receipt of the export."""
    assert forgery.run is not None
    (forgery.run / "export" / RECEIPT).write_bytes(receipt)
    digest = hashlib.sha256(receipt).hexdigest()
    forgery.edit_lines(lambda lines: named(lines, "export")[-1].update(receipt_sha256=digest))
