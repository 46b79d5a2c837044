"""`fullweight plan`: what cannot be asked ends in one message that says what to do, before a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullweight.cli.main import main
from fullweight.train.config import RunConfig

_JOB = ("plan", "flash", "--chip", "h200", "--chips", "32", "--global-batch", "256")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that has to fail, in one line."""
    assert main([str(argument) for argument in arguments]) in (1, 2)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--chips", "0"), "greater than or equal to 1"),
        (("--chips", "-1"), "greater than or equal to 1"),
        (("--chips", "1.5"), "valid integer"),
        (("--chips", "100000000000"), "at most 131,072 are planned"),
        (("--global-batch", "99999999999"), "at most 262,144 rows a step are planned"),
        (("--sequence", "9999999"), "exceeds the model's max_position_embeddings"),
        (
            ("--chips", "31"),
            "no layout of 31 ranks suits rows of 4096 tokens and 256 rows a step; use 16 chips or 32",
        ),
        (("--chip", "h300"), "unknown chip 'h300'; did you mean 'h800' or 'h200' or 'h100'?"),
        (("--chip", ""), "unknown chip ''; valid: a100"),
        (("--method", "grpo"), "--method 'grpo' is not planned; valid: pretrain, sft"),
        (("--optimizer", "sgd"), "expected adamw or muon"),
        (("--price", "nan"), "greater than or equal to 0"),
        (("--price", "-1"), "greater than or equal to 0"),
        (("--price-kwh", "inf"), "--price-kwh inf: expected a number"),
        (("--failure-rate", "0"), "no run is free of interruptions"),
        (("--failure-rate", "nan"), "greater than or equal to 0"),
        (("--checkpoint-seconds", "nan"), "greater than or equal to 0.1"),
        (("--restart-seconds", "inf"), "--restart-seconds inf: expected a number"),
        (("--skew", "nan"), "greater than or equal to 1"),
        (("--skew", "inf"), "--skew inf: expected the load"),
        (("--steps", "0"), "greater than or equal to 1"),
        (("--sweep", "chips="), "commas between"),
        (("--sweep", "batch=1,2"), "expected chips=..., sequence=... or model=..."),
        (("--sweep", "chips=0,2"), "whole numbers above 0"),
        (("--sweep", "chips=²,2"), "whole numbers above 0"),
        (("--sweep", "chips=32"), "has one value; give more"),
        (("--sweep", "chips=16,32,16"), "names a value twice"),
        (("--sweep", "chips=16,32", "--sweep", "sequence=4096,8192"), "2 sweeps; one goes through"),
        (("--sweep", "chips=16,32", "--compare", "h100:32"), "--sweep and --compare do not go together"),
        (("--sweep", "chips=16,32", "--emit", "new.toml"), "--sweep and --emit do not go together"),
        (("--sweep", "model=flash,falsh"), "did you mean 'flash'"),
        (("--compare", "h100"), "expected a chip and a number of chips"),
        (("--compare", "h100:1.5"), "expected a chip and a number of chips"),
        (("--compare", "h100:0"), "expected a chip and a number of chips"),
        (("--json", "absent/plan.json"), "create it"),
    ],
)
def test_what_cannot_be_asked(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert expected in told(capsys, *_JOB, *options)


def test_a_batch_that_suits_no_layout_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = told(capsys, *_JOB[:-1], "1021", "--chips", "65536")
    assert "is not divisible by the data ranks of any layout" in message
    assert "; use " in message


def test_a_recipe_is_not_written_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("mine")
    assert "is there already; remove it or choose another name" in told(capsys, *_JOB, "--emit", recipe)
    assert recipe.read_text() == "mine"
    assert "is a folder; name a file" in told(capsys, *_JOB, "--emit", tmp_path)
    assert "is a folder; name a file" in told(capsys, *_JOB, "--html", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "config.json is"),
        ("[]", "describes model_type 'list'; expected 'deepseek_v4'"),
        ("{}", "describes model_type None; expected 'deepseek_v4'"),
        ('{"model_type": "mamba"}', "describes model_type 'mamba'; expected 'deepseek_v4'"),
        ('{"model_type": "deepseek_v4", "hidden_size": -4}', "hidden_size"),
        ('{"model_type": "deepseek_v4", "hidden_size": 7}', "vocab_size is required"),
    ],
)
def test_a_model_file_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert expected in told(capsys, "plan", file, *_JOB[2:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "x is no chip; a chip is a section"),
        ('[mine]\nbase = "h200"\nmemory_gb = -1', "memory_gb"),
        ('[mine]\nbase = "h200"\nmemory_gb = nan', "memory_gb"),
        ('[mine]\nbase = "h200"\nmemroy_gb = 80', "memory_gb"),
        ('[mine]\nbase = "h2000"', "did you mean 'h200'"),
        ('[mine]\nbase = "h200"\nlinks = []', "links"),
        ('[mine]\nbase = "h200"\npeaks = { fp8 = 1.0 }', "has no bf16"),
        ('[mine]\nbase = "h200"\nmemory_gb = [80.0, "guessed", "me"]', "expected [value, status, source]"),
    ],
)
def test_a_chip_file_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    assert expected in told(capsys, *_JOB, "--chip", "mine", "--chip-file", file)


_SMALL = ("plan", "tiny", "--chip", "h100", "--chips", "8", "--sequence", "512", "--global-batch", "64")


@pytest.mark.parametrize("method", ["sft", "pretrain"])
def test_a_recipe_is_of_the_method(capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "recipe.toml"
    assert main([*_SMALL, "--method", method, "--emit", str(recipe)]) == 0
    config = RunConfig.from_toml(recipe, [])
    assert config.method.name == method
    [source] = config.data.sources
    assert (source.columns.text == "text") is (method == "pretrain")


@pytest.mark.parametrize(
    ("option", "name", "link"),
    [("--emit", "r.toml", "r.toml"), ("--json", "p.json", "p.json"), ("--html", "p.html", ".p.html.tmp")],
)
def test_a_file_that_the_system_does_not_make(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, name: str, link: str
) -> None:
    """Only writing shows it: where it is written lies a link into a folder that is not there."""
    (tmp_path / link).symlink_to(tmp_path / "missing" / name)
    message = told(capsys, *_SMALL, option, tmp_path / name)
    assert message.endswith(f"cannot write {tmp_path / name}: No such file or directory; name another file")


def test_a_chip_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It is not called a recipe."""
    absent = tmp_path / "mine.toml"
    assert f"no chip file at {absent}; give the path" in told(capsys, *_JOB, "--chip-file", absent)
    job = ("rehearse", "recipes/quickstart.toml", "--ranks", "1", "--chip-file", absent)
    assert f"no chip file at {absent}; give the path" in told(capsys, *job)


def test_a_model_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json at absent/config.json" in told(capsys, "plan", "absent/config.json", *_JOB[2:])
    assert "unknown model preset 'falsh'; did you mean 'flash'?" in told(capsys, "plan", "falsh", *_JOB[2:])
