"""Mistakes and hostile files at the command line: one message, a non-zero status, nothing left that looks whole.

Commands that must fail run in this process, through the command line's own `main`: what it does not turn into a
message fails the test. What each reader says of each malformed line is tested beside it, in tests/unit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes import ROOT, fullweight

from fullweight.cli.main import main
from fullweight.evidence.ledger import read

SMOKE = ROOT / "recipes" / "tiny_smoke.toml"
DEEP = b"[" * 200_000
QUICK = ("--set", "train.num_steps=1", "--set", "schedule.warmup_steps=0", "--set", "eval.num_samples=0")


Fails = Callable[..., str]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail cleanly; gives what it says."""

    def command(*arguments: str | Path) -> str:
        assert main([str(a) for a in arguments]) in (1, 2)
        said = capfd.readouterr().err
        assert said.strip()
        assert "Traceback" not in said
        return said

    return command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    ended = fullweight("train", SMOKE, "--output", folder, *QUICK)
    assert ended.ok, ended.output
    return folder


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.changes.vocab_size=100000000000000000000000", "these sizes make"),
        ('model={preset="pro"}', "training 1,598,837,325,086 parameters"),
        ("train.seed=99999999999999999999999", "train.seed"),
        ("train.loss.mtp=-1", "train.loss.mtp"),
        ("model.changes.rope_scaling.beta_slow=0", "rope_scaling.beta_slow"),
        ('data.sources=[{kind="file",path=""}]', "path: String should have at least 1 character"),
        ('data.sources=[{kind="file",path="' + "x" * 5000 + '"}]', "no data file at"),
        ("a=" + "[" * 5000, "unknown key a"),
    ],
)
def test_a_setting_that_cannot_be(setting: str, said: str, tmp_path: Path, fails: Fails) -> None:
    """Also sizes that no machine holds: refused before anything is built, read or written."""
    assert said in fails("train", SMOKE, "--output", tmp_path / "run", *QUICK, "--set", setting)
    assert not (tmp_path / "run").exists()


HALF_A_PAIR = b'{"\\ud800": 1}\n'  # a message about it could not even be printed


@pytest.mark.parametrize("data", [DEEP, bytes(range(256)), b"", b"\xff\xfe\n", HALF_A_PAIR, b"9" * 5000, b"\0"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".toml", ".xyz"])
def test_a_file_of_something_else(suffix: str, data: bytes, tmp_path: Path, fails: Fails) -> None:
    """Whatever its name says it is."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    assert path.name in fails("data", "inspect", path)


def test_a_folder_in_place_of_a_file_and_back(tmp_path: Path, run: Path, fails: Fails) -> None:
    """Each command says what it found instead."""
    (tmp_path / "folder.jsonl").mkdir()
    assert "no data file" in fails("data", "inspect", tmp_path / "folder.jsonl")
    assert "Is a directory" in fails("train", tmp_path)
    assert "is a file" in fails("generate", SMOKE, "--prompt", "x")
    assert "not a run folder" in fails("resume", SMOKE)
    assert "is a checkpoint folder, not a run folder" in fails("resume", run / "export")
    assert "is a file" in fails("init", "--config", run / "model.json", "--out", SMOKE)
    assert "File name too long" in fails("init", "--config", run / "model.json", "--out", tmp_path / ("x" * 300))
    assert "Not a directory" in fails("train", SMOKE, *QUICK, "--output", SMOKE / "run")


def damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(DEEP)


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b"[3]")


def foreign_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    values = json.loads(text)
    values["model"]["vocab"]["far away"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(values))


def foreign_config(folder: Path) -> None:
    change_config(folder, hidden_size=128)


def enormous_config(folder: Path) -> None:
    change_config(folder, hidden_size=10**5, n_routed_experts=256)


def change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(DEEP)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_index, "is not a checkpoint index"),
        (damaged_tokenizer, "malformed tokenizer"),
        (foreign_tokenizer, "the tokenizer's vocabulary (70001) exceeds the model's vocab_size (512)"),
        (foreign_config, "has shape [512, 64], expected [512, 128]"),
        (enormous_config, "of memory, and"),
        (deep_config, "JSON nested too deeply"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says(
    damage: Callable[[Path], None], said: str, run: Path, tmp_path: Path, fails: Fails
) -> None:
    """Found when it is opened, before a model of that size is made."""
    shutil.copytree(run / "export", tmp_path / "export")
    damage(tmp_path / "export")
    assert said in fails("generate", tmp_path / "export", "--prompt", "x")


def test_a_run_folder_that_is_damaged(run: Path, tmp_path: Path, fails: Fails) -> None:
    """Its configuration, or a file where its checkpoints were."""
    shutil.copytree(run, tmp_path / "run")
    kept = (tmp_path / "run" / "config.json").read_bytes()
    (tmp_path / "run" / "config.json").write_bytes(DEEP)
    for arguments in (("resume",), ("generate", "--prompt", "x"), ("chat",)):
        assert "is damaged: JSON nested too deeply" in fails(arguments[0], tmp_path / "run", *arguments[1:])
    (tmp_path / "run" / "config.json").write_bytes(kept)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").write_text("x")
    assert "checkpoints" in fails("resume", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-new-tokens", "99999999999"), "max_position_embeddings"),
        (("--seed", "9" * 30), "--seed"),
        (("--temperature", "nan"), "--temperature"),
        (("--top-p", "0"), "top_p"),
        (("--system", " "), "content is empty"),
    ],
)
def test_a_way_to_generate_that_cannot_be(options: tuple[str, ...], said: str, run: Path, fails: Fails) -> None:
    """Out of range, not a number, or an empty system text."""
    assert said in fails("generate", run, "--prompt", "x", *options)


def test_truncated_and_dropped_samples_are_counted_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the ledger's start event, on the screen, on the page and in `data inspect`, with equal numbers."""
    ask = [{"role": "user", "content": "a"}]
    rows = [[*ask, {"role": "assistant", "content": f"word {i} " * n}] for i, n in enumerate((1, 1, 1, 400, 400))]
    rows.append([{"role": "user", "content": "b " * 3000}, {"role": "assistant", "content": "c"}])
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    names, counts = ("samples", "truncated", "dropped_too_long", "dropped_untrained"), (5, 3, 0, 1)
    source = f'data.sources=[{{kind="file",path="{data}"}}]'
    sets = [part for s in (source, "data.too_long=truncate", "data.held_out_fraction=0") for part in ("--set", s)]
    run = tmp_path / "run"
    ended = fullweight("train", SMOKE, "--output", run, *QUICK, *sets)
    assert ended.ok, ended.output
    ledger = list(read(run / "ledger.jsonl"))
    [found] = next(line["data"] for line in ledger if line.get("what") == "start")
    assert tuple(found["train"][name] for name in names) == counts
    told = "3 truncated, 0 dropped as too long, 1 dropped without a trained token"
    assert told in (run / "report.html").read_text()
    assert f"note: {data}: 5 samples kept, 3 truncated, 1 dropped without a trained token" in ended.output
    for policy, expected in (("truncate", counts), ("drop", (3, 0, 3, 0))):
        (tmp_path / "r.toml").write_text(f'[data]\nrow_tokens = 256\ntoo_long = "{policy}"\nsources = []\n')
        options = ("--set", source, "--tokenizer", str(run / "tokenizer"), "--json")
        assert main(["data", "inspect", str(tmp_path / "r.toml"), *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert tuple(report["sources"][0]["train"][name] for name in names) == expected
