"""What ranks compare before they begin, and how a difference is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fullweight
from fullweight.parallel.agreement import code_digest, disagreement, flat, standing


def test_the_rank_that_differs_from_most_is_named_first_with_both_values() -> None:
    """Four ranks, one other seed, one missing key."""
    most = {"config.train.seed": "1", "torch": "2.13.0"}
    message = disagreement([most, {**most, "config.train.seed": "7"}, most, {"config.train.seed": "1"}])
    assert "config.train.seed: rank 1 has 7, ranks 0, 2-3 have 1" in message
    assert "torch: rank 3 has nothing, ranks 0-2 have 2.13.0" in message


def test_many_differences_are_counted_not_listed() -> None:
    """Another release of the code differs in everything."""
    message = disagreement([{f"key {i}": "a" for i in range(9)}, {f"key {i}": "b" for i in range(9)}])
    assert message.count("rank 0 has a") == 5
    assert "and 4 more" in message


def test_one_changed_comment_is_another_code(tmp_path: Path) -> None:
    """The digest is of content and names, not of a version that nobody raised; compiled files do not count."""
    package = Path(fullweight.__file__).parent
    copy = tmp_path / "fullweight"
    shutil.copytree(package, copy)
    assert code_digest(copy) == code_digest(package)
    other = tmp_path / "other"
    shutil.copytree(package, other)
    (other / "optim" / "muon.py").write_text((other / "optim" / "muon.py").read_text() + "# another\n")
    assert code_digest(other) != code_digest(package)


def test_variables_of_this_package_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own and Python's; those that a device's software reads are the doctor's to know."""
    monkeypatch.setenv("FULLWEIGHT_ALLOW_CPU_FALLBACK", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    facts = standing(2)
    assert facts["environment variable FULLWEIGHT_ALLOW_CPU_FALLBACK"] == "1"
    assert not {name for name in facts if "WANDB" in name}


def test_a_configuration_is_compared_key_by_key() -> None:
    """So that a difference has a name."""
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": {}}, "config.") == {
        "config.a.b.c": "1",
        "config.a.d": "[]",
        "config.e": "{}",
    }
