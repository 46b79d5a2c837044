"""Freezing by name from the command line: the indexer warm-up of the shipped recipe, and what resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.e2e.conftest import ROOT, SMOKE, Command, ledger

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import to_published
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

WARMUP = ROOT / "recipes" / "small_indexer_warmup.toml"


def exported(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in (run / "export").glob("*.safetensors") for n, t in load_file(path).items()}


def fresh(run: Path) -> dict[str, torch.Tensor]:
    """The weights that the run started from, under the published names."""
    config = DeepSeekV4Config.from_file(run / "model.json")
    seed = json.loads((run / "config.json").read_text())["train"]["seed"]
    return to_published(initialise(DeepSeekV4(config, ops="reference"), seed).state_dict(), config)


def test_the_warm_up_recipe_trains_the_indexers_alone(tmp_path: Path, fullweight: Command) -> None:
    """The indexer's loss falls, every other exported tensor has the bits it began with, and the run says so."""
    run = tmp_path / "run"
    done = fullweight("train", WARMUP, "--set", "export.format=float32", "--output", run)
    assert "7,295,014 parameters, 101,952 trained, 7,193,062 frozen" in done.stdout.replace("\n", " ")
    steps = ledger(run)
    indexer = [s["loss"]["indexer"] for s in steps]
    assert max(indexer[-3:]) < 0.85 * min(indexer[:3])
    assert all(s["loss"]["lm"] > 0 for s in steps)
    assert all(s["parameters"] == {"total": 7295014, "trained": 101952} for s in steps)
    assert "lower bound" in steps[0]["mfu_convention"]
    assert ledger(run, "event")[0]["parameters"]["trained"] == 101952
    assert "101,952 trained of 7,295,014" in (run / "report.html").read_text()
    before, after = fresh(run), exported(run)
    assert set(before) == set(after)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if ".indexer." in name}
    assert len(moved) == 12


def test_a_partly_frozen_run_resumes_exactly(tmp_path: Path, fullweight: Command) -> None:
    """After resuming, frozen tensors are still frozen and the numbers are those of a run that never stopped."""
    settings = ["schedule.kind=constant", "eval.num_samples=0", "export.format=float32"]
    settings += ["data.held_out_fraction=0.02"]
    settings += ['train.frozen=["*.experts.*", "*.ffn.gate.*", "embed.weight"]']
    arguments = [SMOKE, *(a for s in settings for a in ("--set", s))]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fullweight("train", *arguments, "--set", "train.num_steps=4", "--output", whole)
    fullweight("train", *arguments, "--set", "train.num_steps=2", "--output", stopped)
    shutil.rmtree(stopped / "export")
    config = json.loads((stopped / "config.json").read_text())
    config["train"]["num_steps"] = 4
    (stopped / "config.json").write_text(json.dumps(config))
    done = fullweight("resume", stopped)
    assert "frozen" in done.stdout
    keys = ("step", "loss", "grad_norm", "parameters", "without_gradient")
    one, two = ([{k: s[k] for k in keys} for s in ledger(run)] for run in (whole, stopped))
    assert one == two
    before, after, resumed = fresh(whole), exported(whole), exported(stopped)
    for name, tensor in after.items():
        assert torch.equal(tensor, resumed[name]), name
        frozen = ".experts." in name or ".ffn.gate." in name or name == "embed.weight"
        assert torch.equal(tensor, before[name]) == (frozen or "tid2eid" in name), name
