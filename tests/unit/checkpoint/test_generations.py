"""Which checkpoint a resume takes, what it refuses, and what is never removed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.checkpoint.saved import save

from fullweight.checkpoint import generations
from fullweight.checkpoint.generations import POINTER, OnCorrupt, choose, listed, locked, newest, set_aside
from fullweight.checkpoint.manifest import CorruptError
from fullweight.core.errors import CheckpointError


def damage(path: Path) -> None:
    shard = path / "__0_0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def names(folder: Path) -> list[str]:
    return [path.name for _, path in listed(folder)]


def test_generations_are_ordered_by_number(tmp_path: Path) -> None:
    """step-100 is newer than step-20; what has another name is no generation."""
    for step in (100, 20):
        save(tmp_path, step)
    for other in (".writing-step-300", "step-abc", "refused-step-200"):
        (tmp_path / other).mkdir()
    assert names(tmp_path) == ["step-20", "step-100"]
    assert newest(tmp_path).name == "step-100"


def test_nothing_saved_is_an_error(tmp_path: Path) -> None:
    """The message says what to do."""
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*start again"):
        choose(tmp_path / "absent")


def test_a_damaged_newest_is_refused_and_the_previous_offered(tmp_path: Path) -> None:
    """The default never goes back by itself; the message names file, reason and the way out."""
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with pytest.raises(CorruptError) as refused:
        choose(tmp_path)
    for part in ("step-2: __0_0_0.distcp has SHA-256", "step-1 is intact", "--on-corrupt previous"):
        assert part in str(refused.value)
    choice = choose(tmp_path, OnCorrupt.previous)
    assert choice.generation.path.name == "step-1"
    assert [r.name for r in choice.refused] == ["step-2"]


def test_the_offer_is_itself_verified(tmp_path: Path) -> None:
    """Two damaged ones: the one before both is offered; none good: said so."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "step-3")
    damage(tmp_path / "step-2")
    with pytest.raises(CorruptError, match="step-1 is intact"):
        choose(tmp_path)
    damage(tmp_path / "step-1")
    for policy in OnCorrupt:
        with pytest.raises(CorruptError, match=r"no other generation .* is good"):
            choose(tmp_path, policy)


def test_what_was_passed_over_is_kept_but_not_found_again(tmp_path: Path) -> None:
    """After going back, the next resume needs no option, and the step can be saved again."""
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    set_aside(tmp_path, choose(tmp_path, OnCorrupt.previous))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "refused-step-2", "step-1"]
    assert choose(tmp_path).generation.step == 1
    assert save(tmp_path, 2).name == "step-2-2"
    assert choose(tmp_path).generation.path.name == "step-2-2"


def test_a_generation_that_vanished_is_noticed(tmp_path: Path) -> None:
    """`latest` remembers it: silently continuing from an older one would lose steps unsaid."""
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    with pytest.raises(CorruptError, match="latest names step-2, which is not there"):
        choose(tmp_path)
    choice = choose(tmp_path, OnCorrupt.previous)
    set_aside(tmp_path, choice)
    assert choose(tmp_path).generation.step == 1


def test_another_generation_in_its_place_is_noticed(tmp_path: Path) -> None:
    """Intact in itself, under the right name, and not the one that was written."""
    elsewhere, here = tmp_path / "other", tmp_path / "this"
    save(here, 1)
    shutil.rmtree(save(here, 2, 5.0))
    shutil.copytree(save(elsewhere, 2, 6.0), here / "step-2")
    with pytest.raises(CorruptError, match="another generation was put in its place"):
        choose(here)


@pytest.mark.parametrize("text", ["", "step-2", "step-2 0123\n", "nonsense\n", "step-2 " + "g" * 64 + "\n"])
def test_a_damaged_pointer_is_refused(tmp_path: Path, text: str) -> None:
    """It has one exact form."""
    save(tmp_path, 1)
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CorruptError, match="latest is damaged"):
        choose(tmp_path)
    assert choose(tmp_path, OnCorrupt.previous).generation.step == 1


def test_a_folder_in_the_pointers_place_is_refused(tmp_path: Path) -> None:
    """Named like every other damage, with the generation that could be taken."""
    save(tmp_path, 1)
    (tmp_path / POINTER).unlink()
    (tmp_path / POINTER).mkdir()
    with pytest.raises(CorruptError, match=r"latest cannot be read: Is a directory\. step-1 is intact"):
        choose(tmp_path)


def test_every_bit_of_the_pointer_matters(tmp_path: Path) -> None:
    """Each single flip is refused, or makes it name nothing that is there."""
    save(tmp_path, 1)
    save(tmp_path, 3)
    pointer = tmp_path / "latest"
    intact = pointer.read_bytes()
    for position in range(0, len(intact), 7):
        for bit in (0, 5):
            changed = bytearray(intact)
            changed[position] ^= 1 << bit
            pointer.write_bytes(changed)
            with pytest.raises(CorruptError):
                choose(tmp_path)


def test_one_newer_than_the_pointer_is_taken(tmp_path: Path) -> None:
    """The process died between the folder's name and the pointer: the folder is whole."""
    save(tmp_path, 1)
    old = (tmp_path / "latest").read_bytes()
    save(tmp_path, 2)
    (tmp_path / "latest").write_bytes(old)
    assert choose(tmp_path).generation.step == 2


def test_no_pointer_yet(tmp_path: Path) -> None:
    """The same at the very first save."""
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    assert choose(tmp_path).generation.step == 1


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    """An intact checkpoint of something else is no checkpoint of this."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(CorruptError, match=r"two is wrong.*step-1 is intact"):
        choose(tmp_path, fits=lambda manifest: "two is wrong" if manifest.facts.step == 2 else None)


def test_removal_never_takes_the_newest_good_one(tmp_path: Path) -> None:
    """Also when newer ones are damaged and `keep` would count them."""
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    damage(paths[2])
    damage(paths[3])
    assert generations.removable(tmp_path, 1, paths[1]) == [paths[0], paths[2]]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second process is refused while the first lives, and only then."""
    program = "import sys, pathlib; from fullweight.checkpoint.generations import locked\n"
    program += "with locked(pathlib.Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with locked(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "is being written by another process (process " in done.stderr
    assert subprocess.run(command, check=False).returncode == 0
