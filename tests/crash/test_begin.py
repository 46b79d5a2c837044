"""kill -9 while a run is being begun: nothing of it is taken for a run, and the same job starts over by itself."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from tests.crash.runs import SETTINGS, assert_same_in_the_end
from tests.processes import Ended, fullweight

from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.core.crash import VARIABLE
from fullweight.data.tokenizer import train_tokenizer
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

pytestmark = pytest.mark.crash
RECIPE = """
model.checkpoint = "{folder}/published"
data.tokenizer = "{folder}/tokenizer"
data.row_tokens = 256
method.name = "sft"
optimizer.learning_rate = 1e-3
train.rows_per_step = 2

[[data.sources]]
kind = "synth"
synth = {{ seed = 1, num_samples = 100, mixture = {{ warm-up = 1 }} }}

[[data.held_out]]
kind = "synth"
synth = {{ seed = 2, num_samples = 20, mixture = {{ warm-up = 1 }} }}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that begins from a published FP4 checkpoint, whose form a run keeps before anything is trained."""
    write_synthetic(DeepSeekV4Config.preset("tiny"), tmp_path / "published")
    texts = (f"{a} + {b} = {a + b}. True or false?" for a in range(40) for b in range(40))
    train_tokenizer(texts, 448, "deepseek-v4").save(tmp_path / "tokenizer")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def train(recipe: Path, folder: Path, ranks: int, crash: str = "", job: str = "") -> Ended:
    """The run, as a job with an id where one is given: the scheduler that starts it again gives the same one."""
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    environment = {VARIABLE: crash, **({"TORCHELASTIC_RUN_ID": job} if job else {})}
    return fullweight("train", recipe, *chosen, "--output", folder, ranks=ranks, environment=environment)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_the_form_of_the_source_is_kept(ranks: int, recipe: Path, tmp_path: Path) -> None:
    """The same job clears what it left and runs; anybody else is told what lies there, and that it is no run."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    ended = train(recipe, folder, ranks, "begin.source", "job-7")
    assert ended.statuses[0] == -signal.SIGKILL, ended.output
    assert "Traceback" not in ended.output
    assert list(folder.glob(".source.writing-*"))
    assert not (folder / "source").exists()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for refused in (train(recipe, other, ranks), train(recipe, other, ranks, job="job-8")):
        assert set(refused.statuses) == {1}, refused.output
        assert "was killed before it had begun; delete the folder" in refused.output
        assert "Traceback" not in refused.output
    resumed = fullweight("resume", other, ranks=ranks)
    assert set(resumed.statuses) == {1}
    assert "is not a run folder: it has no config.json" in resumed.output
    again = train(recipe, folder, ranks, job="job-7")
    assert again.ok, again.output
    assert not list(folder.glob(".source.writing-*"))
    assert train(recipe, whole, ranks).ok
    assert_same_in_the_end(folder, whole)
    kept = sorted(p.relative_to(whole) for p in (whole / "source").rglob("*"))
    assert kept == sorted(p.relative_to(folder) for p in (folder / "source").rglob("*"))
    for name in kept:
        if (whole / name).is_file():
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
