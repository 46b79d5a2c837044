"""Ranks that differ, fail, vanish or stand still: the run ends soon, with one message that names the rank.

Bounds are generous: where a stall is the point, 10 s in one phase of a step that takes a tenth of one; everywhere
else the default of minutes. No test looks at a clock.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from tests.processes import Ended, fullweight

from fullweight.evidence.ledger import read

RECIPE = "recipes/tiny_smoke.toml"
SETTINGS = ["train.num_steps=8", "train.precision=fp32", "train.peak_flops_per_second=1e12", "eval.every=8"]
SETTINGS += ["eval.num_samples=0", "export.enabled=false", "checkpoint.every=2", "checkpoint.asynchronous=false"]
STALL = ("launch.stall_seconds=10", "launch.setup_seconds=60")


def train(folder: Path, fault: str, *settings: str, ranks: int = 2) -> Ended:
    """A run of 8 steps, saved after each second one, with a fault."""
    chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    environment, call = {"FAULT": fault}, "tests.multi.faults:main"
    return fullweight(
        "train", RECIPE, *chosen, "--output", folder, ranks=ranks, environment=environment, call=call
    )


def the_message(ended: Ended) -> str:
    """The one message of a run that ended on all ranks, without a traceback."""
    assert all(ended.statuses), ended.output
    assert "Traceback" not in ended.output
    assert ended.output.count("error (rank ") == 1, ended.output
    return ended.output[ended.output.index("error (rank ") :]


def goes_on(folder: Path) -> None:
    """What the message promised: the run resumes and ends."""
    assert fullweight("resume", folder, ranks=2).ok
    last = list(read(folder / "ledger.jsonl"))[-1]
    assert last["step"] == 8


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    lines = list(read(folder / "ledger.jsonl"))
    return [line for line in lines if line.get("what") == what]


def test_another_configuration_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """The quick case: rank 1 was started with another seed."""
    message = the_message(train(tmp_path / "run", "rank=1 do=config"))
    assert "config.train.seed: rank 1 has 7, rank 0 has 0" in message
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_is_named_with_what_goes_on(tmp_path: Path) -> None:
    """The quick case: in the middle of a forward pass; the printed command then finishes the run."""
    folder = tmp_path / "run"
    ended = train(folder, "rank=1 phase=forward step=4 do=kill")
    assert ended.statuses == (1, -signal.SIGKILL)
    message = the_message(ended)
    assert "rank 1 is gone (killed, out of memory" in message
    assert f"last checkpoint: step-2; continue with\n  fullweight resume {folder}" in message
    goes_on(folder)


@pytest.mark.slow
def test_the_odd_one_of_three_is_named(tmp_path: Path) -> None:
    """By an environment variable that changes how ranks talk."""
    message = the_message(train(tmp_path / "run", "rank=2 do=environment", "train.rows_per_step=3", ranks=3))
    assert "environment variable GLOO_DEVICE_TRANSPORT: rank 2 has TCP, ranks 0-1 have nothing" in message


@pytest.mark.slow
def test_other_data_on_one_machine_is_refused_before_the_model_is_made(tmp_path: Path) -> None:
    """The configuration names the same file, and a rank finds another content there."""
    line = '{{"messages":[{{"role":"user","content":"{}"}},{{"role":"assistant","content":"b"}}]}}\n'
    for rank, word in enumerate("ac"):
        (tmp_path / f"data-{rank}.jsonl").write_text("".join(line.format(f"{word} {n}") for n in range(50)))
    (tmp_path / "data.jsonl").write_text("")
    text = Path(RECIPE).read_text().split("[[data.sources]]")
    source = f'[[data.sources]]\nkind = "file"\npath = "{tmp_path}/data.jsonl"\n\n'
    (tmp_path / "recipe.toml").write_text(text[0] + source + text[1].split("\n\n", 1)[1])
    ended = fullweight(
        *("train", tmp_path / "recipe.toml", "--output", tmp_path / "run", "--set", "tokenizer.vocab_size=300"),
        ranks=2,
        environment={"FAULT": f"rank=1 do=data path={tmp_path}"},
        call="tests.multi.faults:main",
    )
    message = the_message(ended)
    assert "data: rank 1 has" in message
    assert "rank 0 has" in message
    assert "config." not in message


@pytest.mark.slow
def test_another_code_on_one_machine_is_refused(tmp_path: Path) -> None:
    """One changed file of the package on rank 1, with the commit beside the digest."""
    message = the_message(train(tmp_path / "run", "rank=1 do=code"))
    assert "code: rank 1 has 0000" in message


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_rank_meets_is_told_once(rank: int, tmp_path: Path) -> None:
    """By the rank that met it; the others end with it, silently."""
    message = the_message(train(tmp_path / "run", f"rank={rank} phase=forward step=4 do=fail"))
    assert message.startswith(f"error (rank {rank}): shard.jsonl:7: a mistake that only this rank can see")
    goes_on(tmp_path / "run")


@pytest.mark.slow
def test_a_bug_of_one_rank_has_one_traceback(tmp_path: Path) -> None:
    """Its own; the others end quietly."""
    ended = train(tmp_path / "run", "rank=1 phase=backward step=4 do=raise")
    assert all(ended.statuses)
    assert ended.output.count("Traceback") == 1
    assert "AssertionError: a bug of this rank" in ended.output
    assert "error (rank 0)" not in ended.output


@pytest.mark.slow
def test_a_rank_killed_during_set_up_is_named(tmp_path: Path) -> None:
    """Rank 0, which holds the store here."""
    ended = train(tmp_path / "run", "rank=0 phase=evaluation step=0 do=kill")
    assert ended.statuses == (-signal.SIGKILL, 1)
    assert "rank 0, which holds the store, is gone" in ended.output
    assert "there is no checkpoint yet" in ended.output


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_others_leave_their_stacks(tmp_path: Path) -> None:
    """SIGSTOP, in the middle of three; collectives alone would wait for the group's timeout."""
    folder = tmp_path / "run"
    ended = train(folder, "rank=1 phase=backward step=4 do=stop", "train.rows_per_step=3", *STALL, ranks=3)
    message = the_message(ended)
    assert "stood still for more than 10 s: rank 1 does not answer" in message
    assert "last checkpoint: step-2" in message
    stacks = folder / "stalls" / "launch-0"
    assert sorted(p.name for p in stacks.iterdir()) == ["rank-0.txt", "rank-2.txt", "report.txt"]
    for rank in (0, 2):
        text = (stacks / f"rank-{rank}.txt").read_text()
        assert "of step 4" in text
        assert "training_step" in text
        assert "distributed_c10d.py" in text
    assert (stacks / "report.txt").read_text() in message


@pytest.mark.slow
def test_a_stopped_rank_that_holds_the_store_is_named(tmp_path: Path) -> None:
    """Nobody can be asked then; the others say so by themselves."""
    ended = train(tmp_path / "run", "rank=0 phase=forward step=4 do=stop", *STALL)
    message = the_message(ended)
    assert message.startswith("error (rank 1): this rank stood still")
    assert "rank 0, which holds the store, does not answer" in message
    assert (tmp_path / "run" / "stalls" / "launch-0" / "rank-1.txt").is_file()


@pytest.mark.slow
def test_a_rank_that_is_busy_elsewhere_is_named_with_its_line(tmp_path: Path) -> None:
    """It lives, in its data, while the others wait."""
    message = the_message(train(tmp_path / "run", "rank=1 phase=data step=4 do=sleep", *STALL))
    assert "rank 1 works while the others wait in a collective" in message
    assert "rank 1: data of step 4" in message
    assert "faults.py" in message


@pytest.mark.slow
def test_a_rank_in_another_collective_is_named(tmp_path: Path) -> None:
    """It waits for what nobody sends, while two others wait for it."""
    fault = "rank=2 phase=optimizer step=4 do=skip"
    message = the_message(train(tmp_path / "run", fault, "train.rows_per_step=3", *STALL, ranks=3))
    assert "rank 2 is in another place than the others" in message
    assert "recv" in message


@pytest.mark.slow
def test_a_slow_rank_is_warned_of_and_the_run_ends_well(tmp_path: Path) -> None:
    """It sleeps in each backward pass, far below any bound; the ledger and the screen name it."""
    settings = ("train.num_steps=12", "eval.every=12", "checkpoint.every=12")
    ended = train(tmp_path / "run", "rank=1 phase=backward step=0 seconds=2 do=slow", *settings)
    assert ended.ok, ended.output
    found = events(tmp_path / "run", "straggler")
    assert found
    assert {event["rank"] for event in found} == {1}
    assert found[0]["busy_seconds"] > 3 * found[0]["median_seconds"]
    assert "slow: rank 1 worked" in ended.output


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    """Two of three start."""
    ended = train(tmp_path / "run", "rank=2 do=absent", "launch.join_seconds=6", ranks=3)
    assert ended.statuses[:2] == (1, 1)
    assert "rank 2 of 3 did not come within 6 s" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_bounds_are_in_the_ledger(tmp_path: Path) -> None:
    """The group's timeout is ours and stated, above both bounds."""
    assert train(tmp_path / "run", "rank=9 do=none", "launch.stall_seconds=200").ok
    [start] = events(tmp_path / "run", "start")
    assert start["launch"]["stall_seconds"] == 200
    assert start["launch"]["collective_timeout_seconds"] == 3720
