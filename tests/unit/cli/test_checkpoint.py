"""`fullweight checkpoint` as a user types it: what is named, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.checkpoint.saved import save, state

from fullweight.cli.main import main
from fullweight.evidence.state_root import live_root


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What these commands need of a run: its config.json and two checkpoints."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for step in (1, 2):
        save(folder / "checkpoints", step)
    return folder


def run(*arguments: str | Path) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing there, a file, an empty folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        assert run(command, tmp_path / name) == 1
        said = capsys.readouterr().err
        assert str(tmp_path / name) in said
        assert "give the folder of a run" in said


def test_a_damaged_one_is_told_whole(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ls` has room for the reason and fails too, `verify` fails with it, `prune` keeps the one that verifies."""
    manifest = run_folder / "checkpoints" / "step-2" / "manifest.json"
    manifest.write_text("[]")
    reason = f"damaged: {manifest.parent}: manifest.json has SHA-256 "
    assert run("ls", run_folder) == 1
    listed = capsys.readouterr().out
    assert reason in listed
    assert "written (UTC)" in listed
    assert run("verify", run_folder) == 1
    assert reason in capsys.readouterr().out
    assert run("prune", run_folder, "--keep", "1") == 0
    assert (run_folder / "checkpoints" / "step-1").is_dir()
    assert run("prune", run_folder, "--keep", "0") == 2


def test_diff_says_when_it_cannot_write(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is that of states that differ; a --json in no folder is the user's mistake."""
    first = run_folder / "checkpoints" / "step-1"
    assert run("diff", first, first) == 0
    assert run("diff", first, run_folder, "--json", tmp_path / "differences.json") == 1
    assert json.loads((tmp_path / "differences.json").read_text())["tensors"]
    capsys.readouterr()
    assert run("diff", first, run_folder, "--json", tmp_path / "missing" / "differences.json") == 1
    assert "differences.json: No such file or directory; name another file" in capsys.readouterr().err


def test_verify_prints_the_root_of_a_state(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the tensors and the position as they are in memory."""
    assert run("verify", run_folder, "--root") == 0
    assert f"state root {live_root(state(2.0), {'step': 2}).root}\n" in capsys.readouterr().out
