"""`fullweight verify --replay`: what is drawn after sealing and taken again is one more claim of the verdict.

Windows are repeated in this process; the runs were made by others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from tests.processes import fullweight
from tests.unit.audit.cheating import MATRIX
from tests.unit.audit.conftest import Honest

from fullweight.audit.drawn import CLAIM, Replaying
from fullweight.audit.replay import Agreement, ReplayResult
from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.verify import Report, verify
from fullweight.audit.windows import Window, draw
from fullweight.cli.main import main
from fullweight.data.synth import SynthConfig, generate


def windows(report: Report) -> dict[str, ReplayResult]:
    """Results by window."""
    assert report.replayed is not None
    found = [one for one in report.replayed.results if isinstance(one, ReplayResult)]
    assert len(found) == len(report.replayed.results)
    return {str(one.window): one for one in found}


@pytest.fixture(scope="module")
def packed(honest: Honest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The honest run's bundle with its states in it."""
    return seal(honest.run, tmp_path_factory.mktemp("packed") / "bundle", with_checkpoints=True).root


def test_a_bundle_with_its_states_needs_nothing_beside_it(packed: Path) -> None:
    """Coverage is measured again and steps are repeated, bit for bit, from what it packs."""
    files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in packed.rglob("*")}
    report = verify(packed, replaying=Replaying(5, "ab"))
    assert {f.rule: f.status for f in report.findings}["coverage.recomputed"] is Status.holds
    assert windows(report)["3:6"].agreement is Agreement.exact
    last = report.verdicts[-1]
    assert (last.claim, last.status, last.value) == (CLAIM, Status.holds, "steps 3:6 (1 of 1)")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in packed.rglob("*")} == files, "it is only read"


def test_what_a_bundle_calls_kept_cannot_be_left_away(honest: Honest, tmp_path: Path) -> None:
    """A verdict needs the states of the windows that the seal fixed; without them it is not checkable."""
    [verdict] = [v for v in verify(honest.bundle, replaying=Replaying(1, "ab")).verdicts if v.claim == CLAIM]
    assert (verdict.status, verdict.value) == (Status.not_checkable, None)
    assert "give the folder of the run with --run" in verdict.told
    run = tmp_path / "run"
    shutil.copytree(honest.run, run)
    shutil.rmtree(run / "checkpoints" / "step-3")
    report = verify(honest.bundle, run=run, replaying=Replaying(1, "ab"))
    assert report.verdicts[-1].status is Status.not_checkable
    assert "3:6: the state of step 3 is not at hand, which the bundle calls kept" in report.verdicts[-1].told


def test_steps_that_were_not_done_are_found_by_replay_alone(tmp_path: Path) -> None:
    """A dropped row, a frozen matrix, another learning rate: each window is refuted; rules see one of them."""
    data = tmp_path / "samples.jsonl"
    config = SynthConfig(seed=1, num_samples=200, mixture={"warm-up": 1, "stops": 2})
    data.write_text("".join(json.dumps(sample) + "\n" for sample in generate(config)))
    settings = {
        "train.num_steps": "8",
        "train.precision": "fp32",
        "optimizer.muon.ns_dtype": "float32",
        "checkpoint.every": "2",
        "checkpoint.keep": "9",
        "eval.num_samples": "0",
        "eval.every": "100",
        "export.enabled": "false",
        "data.sources": f'[{{ kind = "file", path = "{data}" }}]',
    }
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    ended = fullweight(
        *("train", "recipes/tiny_smoke.toml", *chosen, "--output", tmp_path / "run"),
        call="tests.unit.audit.cheating:train",
    )
    assert ended.ok, ended.output
    seal(tmp_path / "run", tmp_path / "bundle")
    report = verify(tmp_path / "bundle", run=tmp_path / "run", replaying=Replaying(3, "late"))
    alone = {f.told.split("step ")[1][0] for f in report.findings if f.status is Status.refuted}
    assert alone <= {"3"}, "the row that was taken twice has other pairs than real documents"
    assert report.verdicts[-1].status is Status.refuted
    assert report.refuted
    found = windows(report)
    expected = draw([Window(2, 4), Window(4, 6), Window(6, 8)], report.replayed.head, "late", 3)  # type: ignore[union-attr]
    assert list(found) == [str(window) for window in expected]
    assert report.verdicts[-1].told == f"{expected[0]}: {found[str(expected[0])].reason}"
    assert "first divergence at step 3, " in found["2:4"].reason
    assert f"first divergent tensor model.{MATRIX}" in found["4:6"].reason
    assert "first divergence at step 8" in found["6:8"].reason


def test_the_command_draws_and_prints_how(
    honest: Honest, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value is drawn and printed where none is given; the page has the verdict; wrong usage has status 2."""
    page = tmp_path / "page.html"
    given = ["verify", str(honest.bundle), "--run", str(honest.run), "--replay", "1"]
    assert main([*given, "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    beacon = printed.split("--beacon ")[1].split(",")[0]
    assert len(bytes.fromhex(beacon)) == 16
    assert "every value and every bit is equal" in printed
    assert "steps 3:6 (1 of 1)" in page.read_text()
    assert main([*given, "--beacon", beacon, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["claims"][-1]["status"] == "holds"
    replay = found["replay"]
    assert (replay["level"], replay["beacon"], replay["candidates"]) == ("step", beacon, 1)
    assert (replay["results"][0]["agreement"], replay["results"][0]["window"]) == (
        "bit-exact",
        {"start": 3, "stop": 6},
    )
    layer = ["--replay", "1", "--level", "layer"]
    for wrong in (
        ["--beacon", "ab"],
        ["--device", "cpu"],
        ["--replay", "1", "--boundaries", "b"],
        ["--level", "layer"],
        [*layer, "--device", "cpu"],
        ["--data"],
    ):
        assert main(["verify", str(packed), *wrong]) == 2, wrong
    assert main(["verify", str(packed), str(honest.bundle), "--replay", "1"]) == 2


def test_another_device(honest: Honest, capsys: pytest.CaptureFixture[str]) -> None:
    """The window is taken again on the device that is asked for; one that is not there is no verdict."""
    given = ["verify", str(honest.bundle), "--run", str(honest.run), "--replay", "1", "--json", "--device"]
    assert main([*given, "cpu"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["claims"][-1]["status"] == "holds"
    assert main([*given, "gpu"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["claims"][-1]["status"] == "not checkable"
    assert "gpu" in found["claims"][-1]["told"]


def test_single_layers(honest: Honest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A drawn layer alone holds; one of which something else is recorded is refuted by name."""
    layers = ["--layer", "0", "--layer", "2"]
    assert main(["boundaries", str(honest.run), "--step", "3", *layers, "--out", str(tmp_path / "b")]) == 0
    given = ["verify", str(honest.bundle), "--run", str(honest.run), "--replay", "2", "--level", "layer"]
    given += ["--beacon", "ab", "--boundaries", str(tmp_path / "b")]
    capsys.readouterr()
    assert main([*given, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert sorted(result["piece"] for result in found["replay"]["results"]) == ["layer-0", "layer-2"]
    assert found["claims"][-1]["status"] == "holds"
    assert "that the ledger does not name" in found["claims"][-1]["told"], "they were made afterwards"
    path = tmp_path / "b" / "layer-2.rank-0.safetensors"
    with safe_open(path, framework="pt") as stored:
        facts, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file({**tensors, "leaving": tensors["leaving"] * 1.5}, path, facts)
    assert main([*given, "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out)
    assert found["claims"][-1]["status"] == "refuted"
    assert found["claims"][-1]["told"].startswith("layer-2 of step 4: boundary.edited: ")
    assert [rule for rule in found["rules"] if rule["status"] == "refuted"] == []
