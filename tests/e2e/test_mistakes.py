"""A user's mistake is one message and a non-zero status, never a traceback, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.conftest import SMOKE, Command


def fails(fullweight: Command, *arguments: str | Path) -> str:
    """The message of a command that must fail cleanly."""
    done = fullweight(*arguments, check=None)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip()
    return done.stderr


def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, fullweight: Command) -> None:
    """Data errors come before any run folder is made, so that the same command can be repeated."""
    data = tmp_path / "bad.jsonl"
    good = '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'
    data.write_text(good + '{"messages": [\n')
    recipe = tmp_path / "bad.toml"
    head = SMOKE.read_text().split("[[data.sources]]")
    tail = head[1].split("\n\n", 1)[1]
    recipe.write_text(f'{head[0]}[[data.sources]]\nkind = "file"\npath = "{data}"\n\n{tail}')
    output = tmp_path / "run"
    assert "bad.jsonl:2" in fails(fullweight, "train", recipe, "--output", output)
    assert not output.exists()

    data.write_text(good.replace('"user"', '"wizard"'))
    message = fails(fullweight, "train", recipe, "--output", output)
    assert "wizard" in message
    assert "bad.jsonl:1" in message

    data.write_text("")
    assert "bad.jsonl" in fails(fullweight, "train", recipe, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "no_such.toml"], "no recipe at no_such.toml"),
        (["train", SMOKE, "--set", "train.nmu_steps=3"], "did you mean 'num_steps'"),
        (["train", SMOKE, "--set", "novalue"], "key=value"),
        (["train", SMOKE, "--set", "model.changes.o_groups=3"], "not divisible by o_groups"),
        (["resume", "no_such_run"], "not a run folder"),
        (["generate", "no_such_run", "--prompt", "hello"], "no_such_run"),
        (["generate", "recipes", "--prompt", "  "], "--prompt is empty"),
        (["generate", "recipes", "--prompt", "hello"], "config.json"),
        (["chat", "no_such_run"], "no_such_run"),
        (["init", "--config", "no.json", "--out", "x"], "no config.json"),
        (["trian"], "No such command"),
    ],
)
def test_one_clear_message(arguments: list[str | Path], said: str, fullweight: Command) -> None:
    """What was found, what was expected, what to do."""
    assert said in fails(fullweight, *arguments)


def test_a_run_folder_is_never_reused(tmp_path: Path, fullweight: Command) -> None:
    """Starting where something lies already is refused before any work."""
    (tmp_path / "note.txt").write_text("mine")
    assert "not empty" in fails(fullweight, "train", SMOKE, "--output", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_folder_that_cannot_be_written_is_told(fullweight: Command) -> None:
    """The operating system's refusal is a message too."""
    assert "error" in fails(fullweight, "train", SMOKE, "--output", "/proc/fullweight_run")
