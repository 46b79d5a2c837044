"""A replay passes an honest run and says where a dishonest one diverges, on the same stack and on another.

Windows are repeated in this process; the runs were made by others. On another number of threads bits differ, as
they would on another machine, and the bound has to tell rounding from fraud.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import fullweight
from tests.unit.audit.cheating import DROPPED, FASTER, MATRIX

from fullweight.audit import replay as audit_replay
from fullweight.audit.again import Means
from fullweight.audit.replay import Agreement, ReplayResult, Verdict, replay
from fullweight.audit.windows import Window
from fullweight.checkpoint import store
from fullweight.checkpoint.generations import move_pointer, write_pointer
from fullweight.checkpoint.manifest import verify, write_manifest
from fullweight.data.synth import SynthConfig, generate

SETTINGS = {
    "train.num_steps": "8",
    "train.precision": "fp32",
    "train.peak_flops_per_second": "1e12",
    "optimizer.muon.ns_dtype": "float32",
    "checkpoint.every": "2",
    "checkpoint.keep": "9",
    "eval.num_samples": "0",
    "eval.every": "100",
    "export.enabled": "false",
}
OTHER_STACK = Means(threads=2)
CHEAT = "tests.unit.audit.cheating:train"


def settings(data: Path, **changed: str) -> list[str]:
    given = {**SETTINGS, "data.sources": f'[{{ kind = "file", path = "{data}" }}]', **changed}
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


def again(run: Path, window: str, means: Means = Means()) -> ReplayResult:  # noqa: B008 - immutable
    [result] = replay(run, [Window.parse(window)], means)
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the smoke recipe's kind in a file."""
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    config = SynthConfig(seed=1, num_samples=200, mixture={"warm-up": 1, "stops": 2})
    path.write_text("".join(json.dumps(sample) + "\n" for sample in generate(config)))
    return path


@pytest.fixture(scope="module")
def honest(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, then two more after a resume with another learning rate."""
    run = tmp_path_factory.mktemp("runs") / "honest"
    short = settings(data, **{"train.num_steps": "4"})
    ended = fullweight("train", "recipes/tiny_smoke.toml", *short, "--output", run)
    assert ended.ok, ended.output
    changes = ("--set", "train.num_steps=6", "--set", "optimizer.learning_rate=2e-3")
    ended = fullweight("resume", run, *changes)
    assert ended.ok, ended.output
    return run


@pytest.fixture(scope="module")
def dishonest(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `cheating.py` describes it."""
    run = tmp_path_factory.mktemp("runs") / "dishonest"
    ended = fullweight("train", "recipes/tiny_smoke.toml", *settings(data), "--output", run, call=CHEAT)
    assert ended.ok, ended.output
    return run


def test_an_honest_run_repeats_bit_for_bit(honest: Path, tmp_path: Path) -> None:
    """A fresh process, from the beginning over a resume to the end; the run is not touched."""
    files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in honest.rglob("*") if p.is_file()}
    report = tmp_path / "report.json"
    ended = fullweight("replay", honest, "--window", "0:6", "--scratch", tmp_path, "--json", report)
    assert ended.ok, ended.output
    assert "6 steps repeated, with the state at the end: every value and every bit is equal" in ended.output
    [found] = json.loads(report.read_text())
    assert (found["verdict"], found["agreement"], found["stack"]) == ("verified", "bit-exact", [])
    assert found["roots"][0]["parts"] == found["roots"][1]["parts"]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in honest.rglob("*") if p.is_file()} == files
    assert list(tmp_path.iterdir()) == [report], "nothing is left behind"


def test_another_stack_is_held_to_the_bound(honest: Path) -> None:
    """Two threads add in another order: not the same bits, and far within the bound."""
    found = again(honest, "4:6", OTHER_STACK)
    assert (found.verdict, found.agreement) == (Verdict.verified, Agreement.bounded), found.reason
    assert found.stack == ("threads_per_rank: 1 when recorded, 2 here",)
    assert found.bound == 1e-3
    assert found.distance is not None
    assert 0 < found.distance.effect < found.bound
    assert 0 < found.distance.moments < found.bound


def test_what_a_rounding_decides_is_no_refutation_and_no_bound_is_widened(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that differs by a nudge of its first weights is met by nudging.

    As where an expert or an entry was nearly tied: the bound here is less than what the nudge does.
    """
    run, window = tmp_path / "run", [Window(0, 2)]
    short = settings(data, **{"train.num_steps": "2"})
    ended = fullweight(
        "train", "recipes/tiny_smoke.toml", *short, "--output", run, call="tests.unit.audit.cheating:nudge"
    )
    assert ended.ok, ended.output
    plain = again(run, "0:2", OTHER_STACK)
    assert (plain.verdict, plain.nudge) == (Verdict.verified, 0)
    assert plain.distance is not None
    bound = max(plain.distance.effect, plain.distance.moments) / 2
    monkeypatch.setattr(audit_replay, "NUDGES", (4,))
    [met] = replay(run, window, OTHER_STACK, bound)
    assert (met.verdict, met.agreement, met.nudge) == (Verdict.verified, Agreement.bounded, 4), met.reason
    assert met.distance is not None
    assert max(met.distance.effect, met.distance.moments) <= bound
    assert "once the weights were nudged by a rounding" in met.reason

    monkeypatch.setattr(audit_replay, "NUDGES", (3,))
    [open_end] = replay(run, window, OTHER_STACK, bound)
    assert open_end.verdict is Verdict.unchecked, open_end.reason
    assert "near ties decide here" in open_end.reason
    monkeypatch.setattr(audit_replay, "NUDGES", ())
    assert replay(run, window, OTHER_STACK, bound)[0].verdict is Verdict.refuted


@pytest.mark.parametrize(
    "means", [Means(), pytest.param(OTHER_STACK, marks=pytest.mark.slow)], ids=["same stack", "another stack"]
)
def test_what_was_not_done_is_found(means: Means, dishonest: Path) -> None:
    """The honest window passes; a dropped row, a frozen matrix and another learning rate do not."""
    assert again(dishonest, "0:2", means).verdict is Verdict.verified

    dropped = again(dishonest, "2:4", means)
    assert (dropped.verdict, dropped.agreement) == (Verdict.refuted, Agreement.none)
    assert dropped.divergence is not None
    assert dropped.divergence.step == DROPPED
    assert dropped.distance is not None
    assert min(dropped.distance.effect, dropped.distance.moments) > 0.02

    frozen = again(dishonest, "4:6", means)
    assert frozen.verdict is Verdict.refuted
    assert frozen.divergence is None, "what the step computed is what it recorded"
    assert frozen.tensor == f"model.{MATRIX}"
    assert f"first divergent tensor model.{MATRIX}" in frozen.reason

    faster = again(dishonest, "6:8", means)
    assert faster.verdict is Verdict.refuted
    assert faster.distance is not None
    assert faster.distance.effect > 0.1
    assert faster.divergence is not None
    assert faster.divergence.step == FASTER[1], "the first step is recorded before its weights move"


def forged(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change lines of a ledger, and then everything that names the ledger or was named in it."""
    digests = {}
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = verify(folder).manifest
        facts = manifest.facts.model_copy(update={"ledger": None})
        digests[folder.name] = write_manifest(folder, manifest.model_copy(update={"facts": facts}))
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    for entry in entries:
        edit(entry)
        if entry.get("generation") in digests and "manifest_sha256" in entry:
            entry["manifest_sha256"] = digests[entry["generation"]]
    (run / "ledger.jsonl").write_text(
        "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
    )


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def test_an_edited_loss_is_named(honest: Path, tmp_path: Path) -> None:
    """By the checkpoint that knows the ledger; and where that was forged too, by the step itself."""
    run = copied(honest, tmp_path)
    ledger = run / "ledger.jsonl"

    def lower(entry: dict[str, Any]) -> None:
        if (entry["kind"], entry["step"]) == ("step", 4):
            entry["loss"]["lm"] -= 0.25

    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for entry in lines:
        lower(entry)
    ledger.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in lines))
    found = again(run, "2:4")
    assert found.verdict is Verdict.refuted
    assert "step-4 is not a checkpoint of this run's ledger" in found.reason

    run = copied(honest, tmp_path / "forged")
    forged(run, lower)
    for means in (Means(), OTHER_STACK):
        found = again(run, "2:4", means)
        assert found.verdict is Verdict.refuted
        assert found.divergence is not None
        assert (found.divergence.step, found.divergence.field) == (4, "loss.lm")
        assert found.tensor is None, "the weights are those of the run"


def test_a_state_of_something_else_is_refuted(honest: Path, dishonest: Path, tmp_path: Path) -> None:
    """Weights edited after training, with and without the ledger's consent, and a state of another run."""
    edited = "model.layers.0.attn.wkv.weight"
    run = copied(honest, tmp_path)
    folder = run / "checkpoints" / "step-4"
    original = verify(folder)
    tensors = dict(store.stream(original, store.contents(original)))
    tensors[edited][3] *= 1.5
    shutil.rmtree(folder)
    rebuilt = store.save(folder.parent, tensors, original.manifest.facts)
    found = again(run, "2:4")
    assert found.verdict is Verdict.refuted
    assert "step-4 is not what the ledger names" in found.reason

    forged(run, lambda entry: None)
    move_pointer(folder.parent, write_pointer(folder.parent, "step-6", verify(folder.parent / "step-6").sha256))
    found = again(run, "2:4")
    assert rebuilt.path == folder
    assert (found.verdict, found.divergence, found.tensor) == (Verdict.refuted, None, edited)
    assert again(run, "2:4", OTHER_STACK).tensor == edited

    shutil.rmtree(folder)
    shutil.copytree(dishonest / "checkpoints" / "step-4", folder)
    found = again(run, "2:4")
    assert found.verdict is Verdict.refuted
    assert "step-4 is not a checkpoint of this run's ledger" in found.reason


def test_other_data_are_refused(honest: Path, data: Path, tmp_path: Path) -> None:
    """A changed file is told with both identities and exit status 3; the right one may lie elsewhere."""
    (tmp_path / "same").mkdir()
    (tmp_path / "changed").mkdir()
    shutil.copy(data, tmp_path / "same" / data.name)
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "changed" / data.name).write_text("".join([*lines[:7], *lines[8:]]))
    found = again(honest, "2:4", Means(data=tmp_path / "same"))
    assert found.agreement is Agreement.exact
    ended = fullweight("replay", honest, "--window", "2:4", "--data", tmp_path / "changed")
    assert ended.statuses == (3,), ended.output
    assert "not checkable" in ended.output
    for path in (data, tmp_path / "changed" / data.name):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in ended.output, "both digests"
    found = again(honest, "2:4", Means(data=tmp_path / "nowhere"))
    assert (found.verdict, found.reason) == (
        Verdict.unchecked,
        f"no samples.jsonl in {tmp_path / 'nowhere'}; the run read {data}",
    )


def test_what_cannot_be_repeated_is_said(honest: Path, tmp_path: Path) -> None:
    """A window without a state to start from; one past the ledger; damage; draws and their exit statuses."""
    found = again(honest, "3:4")
    assert (found.verdict, found.reason) == (
        Verdict.unchecked,
        "no state of step 3 is kept to start from; kept: 2, 4, 6",
    )
    assert again(honest, "4:9").reason == "the ledger has no line of step 7"
    part = again(honest, "4:5")
    assert (part.agreement, part.distance) == (Agreement.exact, None)
    assert "no state is kept of step 5 to compare" in part.reason
    ended = fullweight("replay", honest, "--windows", "1")
    assert ended.statuses == (2,), ended.output
    ended = fullweight("replay", tmp_path)
    assert ended.statuses == (1,)
    assert "is not a run folder" in ended.output
    assert torch.get_num_threads() > 0
