"""Run folders never mix two runs."""

import json
from pathlib import Path

import pytest
import torch

from fullweight.core.errors import ConfigError
from fullweight.evidence.ledger import Ledger
from fullweight.train.run_folder import RunFolder, environment, free_name, write_json


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    """The message offers a new folder and the way to continue."""
    (tmp_path / "ledger.jsonl").write_text("")
    with pytest.raises(ConfigError, match="fullweight resume"):
        RunFolder(tmp_path).create({})


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    """A path that is a file is not a folder to write in."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        RunFolder(tmp_path / "run").create({})


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """`mkdir` before the run is no mistake."""
    RunFolder(tmp_path).create({})
    assert (tmp_path / "samples").is_dir()


def test_a_cleared_folder_keeps_stacks_and_what_others_put_there(tmp_path: Path) -> None:
    """Starting over removes the run's own things, and then takes only a folder without others' things.

    Of its own, who made it and the record of earlier attempts stay, without the half line of a kill.
    """
    folder = RunFolder(tmp_path / "run")
    folder.create({"launch": "a"})
    folder.stalls.mkdir()
    (folder.samples / "step-0.json").write_text("[]")
    log = Ledger(folder.ledger)
    log.begin("start", 0, {})
    log.close()
    attempt = folder.ledger.read_bytes()
    folder.ledger.write_bytes(attempt + b'{"kind":"st')
    folder.clear()
    assert sorted(p.name for p in folder.root.iterdir()) == ["launch.json", "ledger.jsonl", "stalls"]
    assert folder.ledger.read_bytes() == attempt
    with pytest.raises(ConfigError, match="not empty: a run is being begun there, or was killed"):
        folder.create({"launch": "b"})
    folder.create({"launch": "b"}, again=True)
    (folder.root / "notes.txt").write_text("mine")
    folder.clear()
    assert sorted(p.name for p in folder.root.iterdir()) == ["launch.json", "ledger.jsonl", "notes.txt", "stalls"]
    with pytest.raises(ConfigError, match="not empty"):
        folder.create({"launch": "c"}, again=True)


def test_what_a_kill_at_the_beginning_left_is_cleared(tmp_path: Path) -> None:
    """Folders and files that had no name yet go too; a folder that never became a run is said to be none."""
    folder = RunFolder(tmp_path / "run")
    folder.create({"launch": "a"})
    (folder.root / ".source.writing-123" / "headers").mkdir(parents=True)
    (folder.root / ".model.json.tmp").write_text("{")
    with pytest.raises(ConfigError, match="not empty: a run is being begun there, or was killed"):
        folder.check_free()
    folder.clear()
    assert [p.name for p in folder.root.iterdir()] == ["launch.json"]
    folder.create({"launch": "b"}, again=True)


def test_free_name_counts_up(tmp_path: Path) -> None:
    """The default folder of a recipe that ran before gets a number; an empty one is reused."""
    wanted = tmp_path / "quick"
    assert free_name(wanted) == wanted
    for name in ("quick", "quick-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    (tmp_path / "quick-3").mkdir()
    assert free_name(wanted) == tmp_path / "quick-3"


def test_environment_says_what_the_run_stood_on() -> None:
    """Versions, machine, ranks and threads are JSON; secrets of the environment are not in it."""
    found = json.loads(json.dumps(environment(2, torch.device("cpu"))))
    assert found["packages"]["torch"] == torch.__version__
    assert found["ranks"] == 2
    assert found["machine"]["memory_bytes"] > 0
    assert set(found["machine"]) == {"system", "processor", "cpu_count", "memory_bytes"}
    assert found["device"]["name"] == "cpu"
    assert found["device"]["num_devices"] == 1
    assert "cpu" not in found["device"]["absent"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A value that cannot be written leaves the old file as it was."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
