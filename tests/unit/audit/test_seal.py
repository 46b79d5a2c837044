"""Sealing: what is refused, what a key is, and runs that were interrupted."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
from tests.processes import fullweight
from tests.unit.audit.conftest import Honest
from tests.unit.audit.forging import Entry, Forgery, refuted

from fullweight.audit.claims import Sealed
from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.signing import Signer, Trust, new_key
from fullweight.audit.verify import verify
from fullweight.cli.main import main
from fullweight.core.errors import ConfigError, FullweightError


def test_a_run_with_three_restarts_holds(honest: Honest, tmp_path: Path) -> None:
    """Three times the last checkpoint is lost, and the steps after the one before it are made again."""
    run = tmp_path / "run"
    shutil.copytree(honest.run, run)
    for _ in range(3):
        shutil.rmtree(run / "checkpoints" / "step-6")
        shutil.rmtree(run / "export")
        ended = fullweight("resume", run, "--on-corrupt", "previous")
        assert ended.ok, ended.output
    sealed = seal(run, tmp_path / "bundle", with_checkpoints=True)
    claims = {claim.name: claim for claim in sealed.claims}
    assert (claims["interruptions"].value, claims["steps"].value) == (3, 6)
    assert claims["goodput"].status == Sealed.verified
    performance = json.loads((tmp_path / "bundle" / "performance.json").read_text())
    assert performance["goodput"]["superseded_steps"] == 9
    report = verify(tmp_path / "bundle", run=run, with_data=True)
    assert [f for f in report.findings if f.status is Status.refuted] == []
    assert not report.refuted
    alone = {f.rule: f.status for f in verify(tmp_path / "bundle").findings}
    assert alone["checkpoint.roots"] is Status.holds, "the checkpoints are in the bundle"
    assert alone["ledger.times"] is alone["ledger.wall-time"] is Status.holds

    def another_clock(lines: list[Entry]) -> None:
        """The last segment was made by a machine whose clock was an hour behind."""
        resumes = [i for i, line in enumerate(lines) if line.get("what") == "resume"]
        for line in lines[resumes[-1] :]:
            line["time"] -= 3600

    forgery = Forgery(tmp_path / "bundle", tmp_path / "other")
    forgery.edit_lines(another_clock)
    report = verify(forgery.root)
    assert refuted(report).keys() == {"checkpoint.ledger"}, "its checkpoints name the lines as they were"
    assert "set back between" in next(f.told for f in report.findings if f.rule == "ledger.wall-time")
    goodput = next(v for v in report.verdicts if v.claim == "goodput")
    assert (goodput.value, goodput.status) == (None, Status.not_checkable)


def test_the_crate_names_every_file(honest: Honest) -> None:
    """Each file of the bundle is an entity of the research object, with the digest that the bundle lists."""
    graph = json.loads((honest.bundle / "ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    listed = {f["path"]: f for f in json.loads((honest.bundle / "bundle.json").read_text())["files"]}
    files = {name for name, entity in entities.items() if entity["@type"] == "File"}
    assert files == (listed.keys() | {"bundle.json"}) - {"ro-crate-metadata.json"}
    assert all(entities[n]["sha256"] == listed[n]["sha256"] for n in files - {"bundle.json"})
    assert {part["@id"] for part in entities["./"]["hasPart"]} == files


def _crate_problems(folder: Path) -> list[str]:
    """What of RO-Crate 1.1 a folder breaks: its MUSTs for metadata, root, data entities and flat JSON-LD."""
    document = json.loads((folder / "ro-crate-metadata.json").read_text())
    graph = document["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    context = document["@context"]
    problems = [] if "https://w3id.org/ro/crate/1.1/context" in context else ["context"]
    problems += [] if len(entities) == len(graph) else ["an @id is used twice"]
    problems += [f"{e['@id']} has no type" for e in graph if not e.get("@type")]
    about = {"@type": "CreativeWork", "about": {"@id": "./"}}
    about["conformsTo"] = {"@id": "https://w3id.org/ro/crate/1.1"}
    problems += [] if about.items() <= entities["ro-crate-metadata.json"].items() else ["metadata entity"]
    root = entities["./"]
    problems += [] if root["@type"] == "Dataset" else ["root type"]
    problems += [
        f"root has no {n}" for n in ("name", "description", "datePublished", "license") if not root.get(n)
    ]
    datetime.fromisoformat(root["datePublished"])
    parts = {part["@id"] for part in root["hasPart"]}
    for name, entity in entities.items():
        if entity["@type"] == "File":
            problems += [] if name in parts else [f"{name} is no part of the root"]
            problems += [] if (folder / name).is_file() and ".." not in name else [f"{name} is not there"]
        for key, value in entity.items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict) and set(one) != {"@id"}:
                    problems.append(f"{name}.{key} is nested")
                elif isinstance(one, dict) and one["@id"] not in entities and not key.startswith("conformsTo"):
                    problems.append(f"{name}.{key} leads to {one['@id']}, which is not described")
    licence = entities[root["license"]["@id"]]
    return problems + [f"licence has no {n}" for n in ("name", "description") if not licence.get(n)]


def test_the_crate_is_one_by_its_specification(honest: Honest, tmp_path: Path) -> None:
    """Required properties of RO-Crate 1.1 are there, with a licence, without one, and out of the ZIP file."""
    assert _crate_problems(honest.bundle) == []
    root = json.loads((honest.bundle / "ro-crate-metadata.json").read_text())["@graph"]
    assert "no licence stated" in [entity.get("name") for entity in root]
    given = ["seal", str(honest.run), "--out", str(tmp_path / "bundle"), "--unsigned"]
    packed = ["--ro-crate", "--license", "cc-by-4.0", "--zip", str(tmp_path / "bundle.zip")]
    assert main([*given, "--zip", str(tmp_path / "bundle.zip")]) == 1, "a crate was not asked for"
    assert main([*given, "--ro-crate", "--license", "my own"]) == 1
    assert not (tmp_path / "bundle").exists()
    assert main([*given, *packed]) == 0
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "unpacked")
    assert _crate_problems(tmp_path / "unpacked") == []
    graph = json.loads((tmp_path / "unpacked" / "ro-crate-metadata.json").read_text())["@graph"]
    [root] = [entity for entity in graph if entity["@id"] == "./"]
    assert root["license"] == {"@id": "https://spdx.org/licenses/CC-BY-4.0"}
    assert not verify(tmp_path / "unpacked").refuted


def test_a_key_is_kept_from_others_and_never_overwritten(tmp_path: Path) -> None:
    public = new_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert "PRIVATE" not in public.read_text()
    with pytest.raises(FullweightError, match="never overwritten"):
        new_key(tmp_path / "key.pem")


@pytest.mark.parametrize("text", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_told(text: str, honest: Honest, tmp_path: Path) -> None:
    """In one message, and nothing of the bundle is left behind."""
    (tmp_path / "key.pem").write_text(text)
    with pytest.raises(FullweightError, match="elliptic key"):
        seal(honest.run, tmp_path / "bundle", signer=Signer(key=tmp_path / "key.pem"))
    assert [p.name for p in tmp_path.iterdir()] == ["key.pem"]
    with pytest.raises(FullweightError, match="no public key"):
        verify(honest.bundle, trust=Trust(public_key=tmp_path / "key.pem"))


def test_a_place_that_takes_no_key_or_bundle_is_told(honest: Honest, tmp_path: Path) -> None:
    """Whatever the system says: here a file stands where a folder is needed, or there is none."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make .*file/bundle: Not a directory; choose another --out"):
        seal(honest.run, tmp_path / "file" / "bundle")
    key = tmp_path / "missing" / "key.pem"
    ended = fullweight("seal", "--new-key", key)
    assert ended.statuses == (1,)
    assert ended.output.strip() == f"error: cannot write {key}: No such file or directory; name another file"


def test_a_folder_that_is_no_run_is_told(honest: Honest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no manifest\.json"):
        seal(tmp_path, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="is not empty"):
        seal(honest.run, honest.bundle)


def test_the_command_makes_a_key_and_a_bundle(honest: Honest, tmp_path: Path) -> None:
    ended = fullweight("seal", honest.run, "--out", tmp_path / "bundle", "--new-key", tmp_path / "key.pem")
    assert ended.ok, ended.output
    assert f"fullweight verify {tmp_path / 'bundle'}" in ended.output
    assert not verify(tmp_path / "bundle", trust=Trust(public_key=tmp_path / "key.pem.pub")).refuted
    unsigned = fullweight("seal", honest.run, "--out", tmp_path / "other")
    assert unsigned.statuses == (1,)
    assert "exactly one of --key, --sigstore and --unsigned" in unsigned.output
