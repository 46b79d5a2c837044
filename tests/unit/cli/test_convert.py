"""`fullweight convert` as a user types it: folders, messages, exit status, receipts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fullweight.checkpoint.hf import export_checkpoint, load_model
from fullweight.checkpoint.published import INDEX, totals
from fullweight.checkpoint.receipt import RECEIPT
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.cli.main import main
from fullweight.models.deepseek_v4.config import DeepSeekV4Config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp4`, a checkpoint in the release's layout with a tokenizer, and `plain`, one in bf16."""
    root = tmp_path_factory.mktemp("convert")
    config = DeepSeekV4Config.preset("tiny")
    write_synthetic(config, root / "fp4")
    (root / "fp4" / "tokenizer.json").write_text("{}")
    write_synthetic(config, root / "plain", "bfloat16")
    return root


def run(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def stored(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != RECEIPT}


def test_import_then_export_returns_the_folder(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands and the source's bytes are back, tokenizer included; the receipt's counts are the list's."""
    assert run("import", folders / "fp4", tmp_path / "plain") == 0
    printed = capsys.readouterr()
    found = totals(DeepSeekV4Config.preset("tiny"))
    assert f"read {found.tensors:,} tensors, {found.payload_bytes:,} bytes" in printed.out
    assert "rounding changed values in 0 tensors" in printed.out
    assert "import" in printed.err, "a progress bar"
    assert run("export", tmp_path / "plain", tmp_path / "back") == 0
    assert "exact under the source's scale, 0 by the rule" in capsys.readouterr().out
    assert stored(tmp_path / "back") == stored(folders / "fp4")
    receipt = json.loads((tmp_path / "back" / RECEIPT).read_text())
    assert receipt["totals"]["written"] == {"tensors": found.tensors, "bytes": found.payload_bytes}
    assert receipt["missing"] == receipt["left_over"] == receipt["left_out"] == []


def test_export_of_trained_weights_in_the_sources_form(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's bf16 export needs to be told its source; then it has the source's names, shapes and dtypes."""
    trained = export_checkpoint(load_model(folders / "fp4"), tmp_path / "trained")
    assert run("export", trained, tmp_path / "out") == 1
    assert "--source" in capsys.readouterr().err
    assert run("export", trained, tmp_path / "out", "--source", folders / "fp4") == 0
    weights = {n: b for n, b in stored(tmp_path / "out").items() if n != "tokenizer.json"}
    assert weights == {n: b for n, b in stored(folders / "fp4").items() if n != "tokenizer.json"}


def test_formats_and_names(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every format is written, and what cannot be is refused with the reason."""
    for form in ("bfloat16", "float32", "fp8", "fp4"):
        assert run("export", folders / "fp4", tmp_path / form, "--format", form) == 0
        load_model(tmp_path / form)
    form = ("--format", "bfloat16", "--names", "transformers")
    assert run("export", folders / "fp4", tmp_path / "theirs", *form) == 0
    assert "left out" in capsys.readouterr().out
    assert run("export", folders / "fp4", tmp_path / "no", "--format", "fp8", "--names", "transformers") == 1
    assert "bfloat16 or float32" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert run("export", folders / "fp4", folders / "plain") == 1
    assert "not empty" in capsys.readouterr().err


def test_inspect(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a folder holds; that it is what a receipt says; and a clear refusal of a damaged one."""
    assert run("inspect", folders / "fp4") == 0
    printed = capsys.readouterr().out
    assert "FP4" in printed
    assert "F8_E8M0" in printed
    assert "nothing missing, nothing left over" in printed
    assert run("import", folders / "fp4", tmp_path / "plain") == 0
    assert run("inspect", tmp_path / "plain", "--receipt", tmp_path / "plain" / RECEIPT) == 0
    shard = tmp_path / "plain" / "model-00002-of-00007.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 4
    shard.write_bytes(content)
    capsys.readouterr()
    assert run("inspect", tmp_path / "plain", "--receipt", tmp_path / "plain" / RECEIPT) == 1
    assert "layers.0" in capsys.readouterr().err
    shard.write_bytes(content[:-1])
    assert run("inspect", tmp_path / "plain") == 1
    error = capsys.readouterr().err
    assert "model-00002-of-00007.safetensors is damaged" in error
    assert "Traceback" not in error


def test_synthesise(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a config.json alone; the same bytes as the Python interface with the same seed."""
    assert run("synthesise", folders / "fp4" / "config.json", tmp_path / "made") == 0
    assert stored(tmp_path / "made") == {n: b for n, b in stored(folders / "fp4").items() if n != "tokenizer.json"}
    assert run("synthesise", folders / "fp4" / "config.json", tmp_path / "made") == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no receipt: not JSON"),
        (b"\xff", "is no receipt: not UTF-8"),
        (b"[" * 100_000, "is no receipt: JSON nested too deeply"),
        (b"[]", "is no receipt: it is not a list of tensors"),
        (b"{}", "is no receipt: it lacks 'written'"),
        (b'{"receipt": 1, "written": [3]}', "is no receipt: it is not a list of tensors"),
        (b'{"receipt": 1, "written": ["ab"]}', "is no receipt: it is not a list of tensors"),
        (b'{"receipt": 9, "written": []}', "is a receipt of version 9"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_receipt_is_refused(
    content: bytes | None, message: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file holds: its name, what is wrong and what to give instead."""
    receipt = tmp_path / "receipt.json"
    if content is not None:
        receipt.write_bytes(content)
    assert run("inspect", folders / "fp4", "--receipt", receipt) == 1
    said = capsys.readouterr().err
    assert f"{receipt} {message}" in said


def test_an_index_that_cannot_be_read_is_named(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in its place is not a full disk."""
    shutil.copytree(folders / "fp4", tmp_path / "copy")
    (tmp_path / "copy" / INDEX).unlink()
    (tmp_path / "copy" / INDEX).mkdir()
    assert run("inspect", tmp_path / "copy") == 1
    assert f"{INDEX} cannot be read: Is a directory" in capsys.readouterr().err
