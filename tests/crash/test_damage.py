"""A checkpoint that is not what was written: always found, refused by name, and left for the one before it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.conftest import Whole
from tests.crash.runs import assert_same_in_the_end, lines, resume

from fullweight.checkpoint.manifest import MANIFEST, SEAL, CorruptError, verify

pytestmark = pytest.mark.crash
NUM_FLIPS = 300


@pytest.fixture
def damaged(tmp_path: Path, whole: Whole) -> Path:
    """A copy of the finished two-rank run with the newest checkpoint open to damage."""
    folder = tmp_path / "run"
    shutil.copytree(whole(2), folder, ignore=shutil.ignore_patterns("plots"))
    return folder


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step-8"


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def test_300_random_bit_flips_are_300_detections(damaged: Path) -> None:
    """Half of them anywhere by size, half spread over the files, so that small files are hit often too."""
    path, draw = newest(damaged), random.Random(20)
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    detected = 0
    for number in range(NUM_FLIPS):
        file = files[number % len(files)] if number % 2 else draw.choices(files, sizes)[0]
        intact = file.read_bytes()
        flip(file, draw)
        with pytest.raises(CorruptError, match="manifest" if file.name in (MANIFEST, SEAL) else file.name):
            verify(path)
        detected += 1
        file.write_bytes(intact)
    verify(path)
    assert detected == NUM_FLIPS


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("shard", ["__0_0_0.distcp", "__1_0_0.distcp"])
def test_a_truncated_shard_is_refused(damaged: Path, shard: str, kept: float) -> None:
    """By every rank that resumes; the message names the file, and nothing was changed."""
    file = newest(damaged) / shard
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    ledger = (damaged / "ledger.jsonl").read_bytes()
    ended = resume(damaged)
    assert ended.statuses == (1,)
    assert f"{shard} has {int(len(data) * kept):,} bytes, {len(data):,} were written" in ended.output
    assert "step-6 is intact: resume with `--on-corrupt previous`" in ended.output
    assert "Traceback" not in ended.output
    assert (damaged / "ledger.jsonl").read_bytes() == ledger


def swap(folder: Path) -> None:
    one, two = newest(folder) / "__0_0_0.distcp", newest(folder) / "__1_0_0.distcp"
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])


def mix(folder: Path) -> None:
    shutil.copy(folder / "checkpoints" / "step-6" / "__1_0_0.distcp", newest(folder))


def make_stale(folder: Path) -> None:
    for name in (MANIFEST, SEAL):
        shutil.copy(folder / "checkpoints" / "step-6" / name, newest(folder))


def rename(folder: Path) -> None:
    shutil.rmtree(newest(folder))
    shutil.copytree(folder / "checkpoints" / "step-6", newest(folder))


def vanish(folder: Path) -> None:
    shutil.rmtree(newest(folder))


def flip_one(folder: Path) -> None:
    flip(newest(folder) / "__1_0_0.distcp", random.Random(1))


def zero_a_page(folder: Path) -> None:
    with (newest(folder) / "__0_0_0.distcp").open("r+b") as stream:
        stream.seek(4096)
        stream.write(bytes(4096))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip_one, "__1_0_0.distcp has SHA-256"),
        (zero_a_page, "__0_0_0.distcp has SHA-256"),
        (swap, "__0_0_0.distcp"),
        (mix, "__1_0_0.distcp"),
        (make_stale, "manifest.json is stale: it was written for step-6"),
        (rename, "manifest.json is stale: it was written for step-6"),
        (vanish, "latest names step-8, which is not there"),
    ],
)
def test_damage_is_refused_and_the_previous_one_continues(
    harm: Callable[[Path], None], said: str, damaged: Path, whole: Whole
) -> None:
    """Refused by default; `--on-corrupt previous` goes back, says so, and ends with the same bits."""
    harm(damaged)
    refused = resume(damaged, 2)
    assert refused.statuses == (1, 1)
    assert said in refused.output
    assert "step-6 is intact" in refused.output
    assert "Traceback" not in refused.output
    again = resume(damaged, 2, "--on-corrupt", "previous")
    assert again.ok, again.output
    assert "passed over" in again.output
    assert_same_in_the_end(damaged, whole(2))
    [event] = [e for e in lines(damaged, "event") if e["what"] == "resume"]
    assert (event["generation"], event["superseded_steps"]) == ("step-6", 2)
    assert said in event["refused"][0]["reason"]


def test_another_runs_checkpoint_is_refused(damaged: Path, whole: Whole) -> None:
    """The same model and step, intact, from a run with another ledger."""
    pointer = Path("checkpoints") / "latest"
    for path in (newest(damaged), damaged / "checkpoints" / "step-6"):
        shutil.rmtree(path)
        shutil.copytree(whole(1) / "checkpoints" / path.name, path)
    shutil.copy(whole(1) / pointer, damaged / pointer)
    ended = resume(damaged, 2)
    assert ended.statuses == (1, 1)
    assert "is not a checkpoint of this run's ledger" in ended.output


def test_another_models_checkpoint_is_refused(damaged: Path) -> None:
    """What differs is named, before a model is built; here every tensor has the same shape."""
    config = damaged / "config.json"
    config.write_text(config.read_text().replace('"changes": {}', '"changes": {"routed_scaling_factor": 7.0}'))
    ended = resume(damaged, 2)
    assert ended.statuses == (1, 1)
    assert "is a checkpoint of another model: " in ended.output
    assert "routed_scaling_factor is " in ended.output


def test_another_optimiser_is_refused(damaged: Path) -> None:
    """Muon's momentum does not silently become nothing under AdamW."""
    config = damaged / "config.json"
    config.write_text(config.read_text().replace('"name": "muon"', '"name": "adamw"'))
    ended = resume(damaged, 2)
    assert ended.statuses == (1, 1)
    assert "holds optimizer.muon." in ended.output


def test_an_edited_ledger_is_refused(damaged: Path) -> None:
    """The checkpoint knows the lines under which it was written."""
    ledger = damaged / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"grad_norm":', '"grad_norm":1', 1))
    ended = resume(damaged, 2)
    assert ended.statuses == (1, 1)
    assert "does not begin with the lines that were there" in ended.output
