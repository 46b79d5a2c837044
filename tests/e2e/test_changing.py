"""A finished run is resumed with more steps: the longer run's numbers, and the change in config and ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.crash.runs import RECIPE, SETTINGS, lines
from tests.processes import fullweight

OPTIONS = [*SETTINGS, "schedule.kind=constant", "export.enabled=true", "checkpoint.asynchronous=false"]


def train(folder: Path, num_steps: int) -> None:
    chosen = [part for setting in (*OPTIONS, f"train.num_steps={num_steps}") for part in ("--set", setting)]
    ended = fullweight("train", RECIPE, *chosen, "--output", folder)
    assert ended.ok, ended.output


@pytest.mark.slow
def test_more_steps_than_were_planned(tmp_path: Path) -> None:
    """4 steps, then 6: as 6 at once, in losses and in the export, which is written anew."""
    short, long = tmp_path / "short", tmp_path / "long"
    train(short, 4)
    train(long, 6)
    refused = fullweight("resume", short, "--set", "data.seed=5", "--set", "train.num_steps=2")
    assert refused.statuses == (1,)
    assert "cannot change data.seed (0 -> 5): the checkpoint's place in the data" in refused.output
    ended = fullweight("resume", short, "--set", "train.num_steps=3")
    assert "ends before the checkpoint, which is of step 4" in ended.output
    assert lines(short)[-1]["step"] == 4
    ended = fullweight("resume", short, "--set", "train.num_steps=6")
    assert ended.ok, ended.output
    assert "train.num_steps 4 -> 6" in ended.output
    assert [(e["step"], e["loss"]) for e in lines(short)] == [(e["step"], e["loss"]) for e in lines(long)]
    [event] = [e for e in lines(short, "event") if e["what"] == "resume"]
    assert event["config_changes"] == {"train.num_steps": [4, 6]}
    assert json.loads((short / "config.json").read_text())["train"]["num_steps"] == 6
    shards = sorted((long / "export").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (short / "export" / shard.name).read_bytes() == shard.read_bytes()
    receipt = json.loads((short / "export" / "receipt.json").read_text())
    assert receipt["origin"].startswith("the model of this run after step 6")
