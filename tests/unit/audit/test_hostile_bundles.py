"""Bundles that were made to do harm: refused by the name of a rule, with nothing run, waited for or written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes import fullweight
from tests.unit.audit.conftest import Honest
from tests.unit.audit.forging import Forgery

from fullweight.audit.signing import Trust
from fullweight.audit.verify import verify
from fullweight.cli.main import main
from fullweight.evidence.bundle import MOST_LINE_BYTES, RefusedError


def _list(root: Path, path: str) -> None:
    listing = json.loads((root / "bundle.json").read_text())
    listing["files"].append({"path": path, "size_bytes": 1, "sha256": "0" * 64})
    (root / "bundle.json").write_text(json.dumps(listing))


def _link(root: Path) -> None:
    (root / "model.json").unlink()
    (root / "model.json").symlink_to("/etc/hostname")


def _linked_folder(root: Path) -> None:
    shutil.rmtree(root / "samples")
    (root / "samples").symlink_to("/etc")


def _hard_link(root: Path) -> None:
    os.link(root / "model.json", root.parent / "elsewhere")


def _pipe(root: Path) -> None:
    (root / "model.json").unlink()
    os.mkfifo(root / "model.json")


def _endless_line(root: Path) -> None:
    """Ten gigabytes without a newline, of which the disk holds nothing."""
    with (root / "ledger.jsonl").open("wb") as stream:
        stream.truncate(10 * 10**9)


def _long_line(root: Path) -> None:
    with (root / "ledger.jsonl").open("ab") as stream:
        stream.write(b" " * (MOST_LINE_BYTES + 1) + b"\n")


def _append(text: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / "ledger.jsonl").open("ab") as stream:
            stream.write(text)

    return change


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def _without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def _first_step(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / "ledger.jsonl").read_text()
        assert old in text
        (root / "ledger.jsonl").write_text(text.replace(old, new, 1))

    return change


def _version(root: Path) -> None:
    listing = json.loads((root / "bundle.json").read_text())
    (root / "bundle.json").write_text(json.dumps({**listing, "format": 2}))


def _cut(root: Path) -> None:
    content = (root / "ledger.jsonl").read_bytes()
    (root / "ledger.jsonl").write_bytes(content[:-100])


HOSTILE: list[tuple[str, Callable[[Path], object], str]] = [
    ("an unknown version", _version, "bundle.version"),
    ("no list", _without("bundle.json"), "bundle.complete"),
    ("a listed file that is not there", lambda root: _list(root, "more.json"), "bundle.complete"),
    ("a file that is not listed", _write("more.json", "{}"), "bundle.complete"),
    ("a ledger cut within a line", _cut, "bundle.complete"),
    ("an empty ledger", _write("ledger.jsonl", ""), "bundle.complete"),
    ("a path out of the folder", lambda root: _list(root, "../../etc/passwd"), "bundle.paths"),
    ("an absolute path", lambda root: _list(root, "/etc/passwd"), "bundle.paths"),
    ("a path with a backslash", lambda root: _list(root, "a\\b"), "bundle.paths"),
    ("the list in itself", lambda root: _list(root, "bundle.json"), "bundle.paths"),
    ("a name with a control character", _write("a\x1b[2J.json", "{}"), "bundle.paths"),
    ("a symbolic link", _link, "bundle.plain-files"),
    ("a linked folder", _linked_folder, "bundle.plain-files"),
    ("a pipe", _pipe, "bundle.plain-files"),
    ("a hard link", _hard_link, "bundle.hard-links"),
    ("a line of 10 GB", _endless_line, "bundle.line-length"),
    ("a long line", _long_line, "bundle.line-length"),
    ("bytes that are no UTF-8", _append(b'{"kind":"event","what":"\xff"}\n'), "bundle.json"),
    ("a NaN loss", _first_step('"total_loss":', '"total_loss":NaN,"x":'), "bundle.json"),
    ("a number beyond all bounds", _first_step('"grad_norm":', '"grad_norm":1e999,"x":'), "bundle.json"),
    ("a key given twice", _first_step('"grad_norm":', '"grad_norm":0,"grad_norm":'), "bundle.json"),
    ("a number of many digits", _append(b'{"step":' + b"9" * 5000 + b"}\n"), "bundle.json"),
    ("nesting without end", _write("claims.json", "[" * 100_000), "bundle.json"),
    ("deep nesting", _write("claims.json", "[" * 200 + "]" * 200), "bundle.json"),
    ("no JSON", _write("model.json", "import os"), "bundle.json"),
    ("claims of another shape", _write("claims.json", '[{"name": 1}]'), "bundle.json"),
    ("a manifest of another shape", _write("manifest.json", "[]"), "bundle.json"),
    ("a signature that is none", _write("bundle.sig", '{"dsseEnvelope": []}'), "bundle.signature"),
    ("a signature cut short", lambda root: os.truncate(root / "bundle.sig", 100), "bundle.signature"),
    ("a line of an unknown kind", _append(b'{"kind":"magic","step":1}\n'), "ledger.shape"),
    (
        "a step in less than no time",
        _first_step('"seconds":{"data":', '"seconds":{"data":-1,"x":'),
        "ledger.shape",
    ),
    ("a step in endless time", _first_step('"seconds":{"data":', '"seconds":{"data":1e300,"x":'), "ledger.shape"),
    ("a step before the first", _first_step('"step":1,', '"step":-1,'), "ledger.shape"),
]


@pytest.mark.parametrize(("change", "rule"), [pytest.param(c, r, id=name) for name, c, r in HOSTILE])
def test_a_hostile_bundle_is_refused_by_name(
    change: Callable[[Path], object], rule: str, honest: Honest, tmp_path: Path
) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    change(forgery.root)
    for trust in (Trust(public_key=honest.public_key), Trust()):
        with pytest.raises(RefusedError) as refusal:
            verify(forgery.root, trust=trust)
        assert refusal.value.rule == rule
        assert len(str(refusal.value)) < 1000


def test_a_configuration_is_read_and_its_paths_are_not_followed(honest: Honest, tmp_path: Path) -> None:
    """A model's path that leads to a pipe would be waited for for ever."""
    os.mkfifo(tmp_path / "config.json")
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("config.json", lambda c: c["model"].update(preset=None, config=str(tmp_path / "config.json")))
    forgery.edit_manifest(lambda m: m["config"]["model"].update(preset=None, config=str(tmp_path / "config.json")))
    assert verify(forgery.root).refuted


def test_verifying_writes_nothing(honest: Honest, tmp_path: Path) -> None:
    """Neither into the bundle nor into the run, also when both are looked at."""
    forgery = Forgery(honest.bundle, tmp_path, honest.run)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    verify(forgery.root, run=forgery.run, trust=Trust(public_key=honest.public_key))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_what_is_required_must_hold(honest: Honest, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be checked leaves the status 0 unless it is required, by the name of a claim or of a rule."""
    given = ["verify", str(honest.bundle), "--json"]
    key = ["--public-key", str(honest.public_key)]
    assert main(given) == 0
    assert main([*given, "--require", "bundle.signature"]) == 3
    assert "bundle.signature: it is signed; give the key" in capsys.readouterr().err
    assert main([*given, *key, "--require", "bundle.signature", "--require", "mfu"]) == 0
    assert main([*given, *key, "--require", "replay"]) == 3
    assert main([*given, *key, "--require", "complete"]) == 3
    assert main([*given, *key, "--require", "all"]) == 3
    told = capsys.readouterr().err
    assert "energy-per-token" in told or "full-parameter" in told
    assert main([*given, "--require", "mfus"]) == 1
    assert "did you mean mfu?" in capsys.readouterr().err


def test_the_command_tells_by_its_status(honest: Honest, tmp_path: Path) -> None:
    """0 holds, 1 refuted, 2 usage, 3 refused; what a stranger wrote cannot steer the terminal."""
    held = fullweight("verify", honest.bundle, "--public-key", honest.public_key, "--json")
    assert held.statuses == (0,), held.output
    [found] = json.loads(held.output)
    assert not found["refuted"]
    assert {claim["status"] for claim in found["claims"]} <= {"holds", "not checkable"}

    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("claims.json", lambda c: c[0].update(value="\x1b[2J[bold]5"))
    refuted = fullweight("verify", forgery.root)
    assert refuted.statuses == (1,)
    assert "\x1b" not in refuted.output
    assert "REFUTED" in refuted.output

    (forgery.root / "claims.json").write_text("[]")
    forgery.relist()
    for needed, status in (([], 0), (["--require", "steps"], 3), (["--require", "all"], 3)):
        told = fullweight("verify", forgery.root, *needed)
        assert told.statuses == (status,), told.output

    _version(forgery.root)
    refused = fullweight("verify", forgery.root)
    assert refused.statuses == (3,)
    assert "bundle.version" in refused.output
    assert "Traceback" not in refused.output
    assert fullweight("verify").statuses == (2,)
