"""A run on two ranks, sealed and verified by one process."""

from __future__ import annotations

from pathlib import Path

from tests.processes import ROOT, fullweight

from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.signing import Signer, Trust, new_key
from fullweight.audit.verify import verify


def test_a_run_on_two_ranks_is_verified_on_one(tmp_path: Path) -> None:
    """Every rule holds, with run and data at hand: batches, roots and FLOPs are those of both ranks together."""
    run, key = tmp_path / "run", tmp_path / "key.pem"
    settings = ("train.num_steps=4", "eval.num_samples=2", "eval.max_new_tokens=4", "checkpoint.every=2")
    chosen = [part for setting in settings for part in ("--set", setting)]
    ended = fullweight("train", ROOT / "recipes" / "tiny_smoke.toml", *chosen, "--output", run, ranks=2)
    assert ended.ok, ended.output
    public = new_key(key)
    seal(run, tmp_path / "bundle", signer=Signer(key=key))
    report = verify(tmp_path / "bundle", run=run, trust=Trust(public_key=public), with_data=True)
    assert [f for f in report.findings if f.status is not Status.holds] == []
