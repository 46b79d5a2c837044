"""A piece repeated alone gives what it gave in the model, weights after the step included; fraud is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.processes import fullweight

from fullweight.audit import piece as module
from fullweight.audit.again import Means
from fullweight.audit.drawn import Replayed, Replaying
from fullweight.audit.layer import LayerResult, repeat_layers
from fullweight.audit.replay import Verdict
from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.verify import verify as check
from fullweight.audit.windows import draw
from fullweight.checkpoint import store
from fullweight.checkpoint.hashing import digest
from fullweight.checkpoint.manifest import read_manifest, verify
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.evidence import ledger
from fullweight.train.boundaries import GRADIENT, INDEX, Listed, root_of

# the preset's layers: hash routing, both kinds of compressed attention, a sliding window
PIECES = ("embedding", "layer-0", "layer-1", "layer-2", "layer-3", "mtp", "head")
SETTINGS = {
    "train.num_steps": 5,
    "train.rows_per_step": 2,
    "train.peak_flops_per_second": 1e12,
    "eval.num_samples": 0,
    "eval.every": 100,
    "export.enabled": "false",
    "checkpoint.keep": 4,
    "boundaries.every": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boundaries of steps 3 and 5, the states before and after each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    chosen = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", folder)
    assert ended.ok, ended.output
    return folder


@pytest.fixture(scope="module")
def loose(run: Path) -> Path:
    """The same states, without the place in the ledger that each says it has: a forger's first step."""
    folder = Path(shutil.copytree(run, run.parent / "loose"))
    for step in (2, 3, 4, 5):
        if (folder / "checkpoints" / f"step-{step}").exists():
            restate(folder, step, lambda tensors: None)
    return folder


@pytest.fixture
def copy(loose: Path, tmp_path: Path) -> Path:
    """A run to be tampered with."""
    return Path(shutil.copytree(loose, tmp_path / "copy"))


def test_each_piece_alone_gives_the_same_bits(run: Path, tmp_path: Path) -> None:
    """In a fresh process with the piece's weights alone, the optimisers' step and its state after it included."""
    report = tmp_path / "report.json"
    ended = fullweight("replay", run, "--level", "layer", "--json", report)
    assert ended.ok, ended.output
    found = json.loads(report.read_text())
    assert [(r["step"], r["piece"]) for r in found] == [(step, piece) for step in (3, 5) for piece in PIECES]
    for result in found:
        assert (result["verdict"], result["exact"], result["differing"]) == ("verified", True, []), result
        assert result["after"], "the state after the step is kept"
        assert result["bound_in_ledger"]
        assert result["stack"] == []
    assert ended.output.count("every bit is equal") == 2 * len(PIECES)
    with safe_open(run / "boundaries" / "step-3" / "layer-1.rank-0.safetensors", framework="pt") as stored:
        facts = json.loads(stored.metadata()["boundary"])
        entering = stored.get_tensor("entering")
        assert (entering.dtype, entering.shape[0]) == (torch.bfloat16, 2)
        assert stored.get_tensor("entering" + GRADIENT).abs().sum() > 0
    assert any("experts" in name for name in facts["gradients"])


def test_the_ledger_has_the_root_before_the_end(run: Path) -> None:
    """The event comes behind its step and names what the list adds up to; files are those of the list."""
    for event in (e for e in ledger.read(run / "ledger.jsonl") if e.get("what") == "boundaries"):
        folder = run / "boundaries" / event["folder"]
        listing = json.loads((folder / INDEX).read_text())
        files = [Listed(**entry) for entry in listing["files"]]
        assert event["merkle_root"] == root_of(files)
        assert event["files"] == len(PIECES) == len(files)
        assert event["step"] == listing["step"]
        assert all(digest(folder / f.name).sha256 == f.sha256 for f in files)


def test_stored_steps_are_like_any_other(run: Path, tmp_path: Path) -> None:
    """Watching changes no bit: a replay of whole steps, which watches nothing, comes to the same state."""
    ended = fullweight("replay", run, "--window", "2:5")
    assert ended.ok, ended.output
    assert "every value and every bit is equal" in ended.output


def test_taken_again_it_is_the_same(run: Path, tmp_path: Path) -> None:
    """`fullweight boundaries` gives the same tensors after the fact, and says that nothing binds them."""
    out = tmp_path / "again"
    ended = fullweight("boundaries", run, "--step", "2", "--layer", "1", "--layer", "head", "--out", out)
    assert ended.ok, ended.output
    for piece in ("layer-1", "head"):
        name = f"{piece}.rank-0.safetensors"
        assert digest(out / name) == digest(run / "boundaries" / "step-3" / name)
    ended = fullweight("boundaries", run, "--step", "2", "--layer", "9", "--out", out)
    assert ended.statuses == (1,)
    assert "there is no piece layer-9; this model has embedding, layer-0" in ended.output


def test_only_the_piece_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights and moments are all that leaves the disk as tensors."""
    asked: list[str] = []
    stream = store.stream

    def listening(generation: Any, names: Any) -> Any:
        asked.extend(names := list(names))
        return stream(generation, names)

    monkeypatch.setattr(module.store, "stream", listening)
    found = repeat_layers(run, [run / "boundaries" / "step-3"], Means(), chosen=["1"])
    assert [r.piece for r in found] == ["layer-1"]
    assert asked
    assert all(".layers.1." in name for name in asked)


def test_a_bundle_draws_from_what_its_ledger_names(run: Path, tmp_path: Path) -> None:
    """Out of all pieces of all steps that it names, none other, and none left away or put beside is a choice."""
    seal(run, tmp_path / "bundle")
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    boundaries = folder / "boundaries"
    shutil.copytree(boundaries / "step-3", boundaries / "step-33")  # a copy would be drawn in its place

    def drawn(count: int = 2, at_hand: Path | None = folder) -> tuple[Replayed, Status, str]:
        report = check(tmp_path / "bundle", run=at_hand, replaying=Replaying(count, "ab", layers=True))
        [claim] = [verdict for verdict in report.verdicts if verdict.claim == "replay"]
        assert report.replayed is not None
        return report.replayed, claim.status, claim.told

    found, status, told = drawn()
    every = [(step, piece) for step in (3, 5) for piece in PIECES]
    expected = draw(every, ledger_head(run), "ab", 2)
    assert [(r.step, r.piece) for r in found.results if isinstance(r, LayerResult)] == expected
    assert (found.candidates, status, told) == (len(every), Status.holds, "; ".join(["every bit is equal"] * 2))
    assert drawn(at_hand=None)[1:] == (
        Status.not_checkable,
        "no checkpoint is at hand: give the folder of the run with --run",
    )

    shutil.rmtree(folder / "checkpoints" / "step-2")
    _, status, told = drawn(99)
    assert status is Status.not_checkable
    assert "no state of step 2 is kept to start from" in told, "the bundle calls it kept, so its pieces are drawn"

    listing = json.loads((boundaries / "step-5" / INDEX).read_text())
    listing["files"] = [entry for entry in listing["files"] if not entry["name"].startswith("head")]
    (boundaries / "step-5" / INDEX).write_text(json.dumps(listing))
    _, status, told = drawn()
    assert (status, told.partition(": ")[0]) == (Status.refuted, "step-5 of step 5")
    assert "boundary.unbound" in told


def ledger_head(run: Path) -> str:
    return hashlib.sha256((run / "ledger.jsonl").read_bytes().splitlines()[-1]).hexdigest()


@pytest.mark.slow
def test_pieces_are_drawn_as_windows_are(run: Path) -> None:
    """The same public value draws the same pieces; another one others."""
    drawn = [
        [(r.step, r.piece) for r in repeat_layers(run, [], Means(), drawn=(3, value))] for value in ("a", "a", "b")
    ]
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_elsewhere_rounding_is_let_pass(run: Path) -> None:
    found = of_step_3(run, Means(threads=2), chosen=["1", "mtp", "head"])
    assert [r.verdict for r in found] == [Verdict.verified] * 3, found
    assert all(r.stack == ("threads: 1 when recorded, 2 here",) for r in found)
    assert not all(r.exact for r in found), "two threads add up in another order"


def edit(run: Path, piece: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change a file of step 3 and all that a forger can make fit it: the list, the chain of the ledger."""
    folder = run / "boundaries" / "step-3"
    path = folder / f"{piece}.rank-0.safetensors"
    with safe_open(path, framework="pt") as stored:
        facts = json.loads(stored.metadata()["boundary"])
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no dict
    change(facts, tensors)
    save_file(tensors, path, {"boundary": json.dumps(facts)})
    relist(run)


def relist(run: Path) -> None:
    folder = run / "boundaries" / "step-3"
    listing = json.loads((folder / INDEX).read_text())
    found = {path.name: digest(path) for path in folder.glob("*.safetensors")}
    listing["files"] = [Listed(n, d.size_bytes, d.sha256).__dict__ for n, d in sorted(found.items())]
    (folder / INDEX).write_text(json.dumps(listing))
    root = root_of([Listed(**entry) for entry in listing["files"]])
    name_in_ledger(run, "boundaries", 3, {"merkle_root": root})


def name_in_ledger(run: Path, what: str, step: int, values: dict[str, Any]) -> None:
    """Write the ledger anew with another value in an event, its chain whole."""
    lines = list(ledger.read_all(run / "ledger.jsonl"))
    previous, out = "0" * 64, []
    for line in lines:
        entry = dict(line.entry)
        if entry.get("what") == what and entry["step"] == step:
            entry |= values
        entry["previous"] = previous
        raw = json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()
        previous = hashlib.sha256(raw).hexdigest()
        out.append(raw + b"\n")
    (run / "ledger.jsonl").write_bytes(b"".join(out))


def restate(run: Path, step: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write a kept state anew with other tensors in it, and have the ledger name it."""
    path = run / "checkpoints" / f"step-{step}"
    generation = verify(path)
    tensors = dict(store.stream(generation, sorted(store.contents(generation))))
    change(tensors)
    facts = read_manifest(path)[0].facts.model_copy(update={"ledger": None})
    shutil.rmtree(path)
    other = run / "other"
    made = store.save(other, tensors, facts).path
    made.rename(path)
    shutil.rmtree(other)
    name_in_ledger(run, "checkpoint", step, {"manifest_sha256": verify(path).sha256})


def of_step_3(run: Path, means: Means = Means(), **options: Any) -> list[LayerResult]:  # noqa: B008 - immutable
    return repeat_layers(run, [run / "boundaries" / "step-3"], means, **options)


def failures(found: list[LayerResult]) -> set[tuple[str, str]]:
    return {(r.piece, str(r.failure)) for r in found if r.verdict is Verdict.refuted}


def test_files_that_are_not_what_was_bound(run: Path, copy: Path) -> None:
    """Edited, missing, another list, another step's, torn: each by its own name, before anything is repeated."""
    folder = copy / "boundaries" / "step-3"
    path = folder / "layer-1.rank-0.safetensors"
    content = path.read_bytes()

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert failures(of_step_3(copy, chosen=["1"])) == {("layer-1", "boundary.edited")}
    path.unlink()
    assert failures(of_step_3(copy, chosen=["1"])) == {("layer-1", "boundary.missing")}
    shutil.copy(copy / "boundaries" / "step-5" / path.name, path)
    assert failures(of_step_3(copy, chosen=["1"])) == {("layer-1", "boundary.edited")}
    listed = json.loads((folder / INDEX).read_text())
    listed["files"] = [f for f in listed["files"] if f["name"] != path.name]
    (folder / INDEX).write_text(json.dumps(listed))
    assert failures(of_step_3(copy)) == {("step-3", "boundary.unbound")}
    relist(copy)  # a forger who wrote the whole ledger anew, with another step's file in this one's place
    assert ("layer-1", "boundary.other_step") in failures(of_step_3(copy, chosen=["1"]))
    path.write_bytes(content[: len(content) // 2])
    relist(copy)
    assert failures(of_step_3(copy, chosen=["1"])) == {("layer-1", "boundary.damaged")}


def test_what_a_layer_did_not_do_is_named(copy: Path) -> None:
    """Another output, another gradient, on another stack too, whatever of list and ledger was made to fit."""

    def louder(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["leaving"] *= 1.25

    def turned(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["entering" + GRADIENT] *= -1

    def unlearnt(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del facts["gradients"]["layers.1.attn.wq_b.weight"]

    before = (copy / "boundaries" / "step-3" / "layer-1.rank-0.safetensors").read_bytes()
    for change, name in (
        (louder, "replay.leaving"),
        (turned, "replay.entering_gradient"),
        (unlearnt, "replay.parameter_gradient"),
    ):
        edit(copy, "layer-1", change)
        for means in (Means(), Means(threads=2)):
            found = failures(of_step_3(copy, means, chosen=["1"]))
            assert ("layer-1", name) in found, (means, found)
            assert (("joints", "boundary.apart") in found) == (change is not unlearnt)
        (copy / "boundaries" / "step-3" / "layer-1.rank-0.safetensors").write_bytes(before)
        relist(copy)
    assert failures(of_step_3(copy)) == set()


def test_another_loss_is_found_at_the_head(copy: Path) -> None:
    lines = [line.entry for line in ledger.read_all(copy / "ledger.jsonl")]
    told = next(entry for entry in lines if entry["kind"] == "step" and entry["step"] == 3)["loss"]["lm"]
    text = (copy / "ledger.jsonl").read_text().replace(f'"lm":{told!r}', f'"lm":{told * 0.9!r}')
    (copy / "ledger.jsonl").write_text(text)
    name_in_ledger(copy, "none", 0, {})  # the chain, whole again
    assert failures(of_step_3(copy)) == {("head", "replay.loss")}


def test_weights_after_the_step_come_from_it(copy: Path) -> None:
    """A frozen layer, edited weights and moments after the step, edited ones before it, another state."""
    generation = verify(copy / "checkpoints" / "step-2")
    before = dict(store.stream(generation, sorted(store.contents(generation))))
    honest = shutil.copytree(copy, copy.parent / "honest")

    def fresh() -> Path:
        shutil.rmtree(copy)
        return Path(shutil.copytree(honest, copy))

    def frozen(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {n: before[n].clone() for n in tensors if n.startswith("model.layers.1.")}

    def nudged(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.attn.wkv.weight"] += 1e-2

    def other_moment(tensors: dict[str, torch.Tensor]) -> None:
        tensors["optimizer.muon.layers.1.attn.wkv.weight.momentum"] *= 2

    def one_matrix(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.attn.wkv.weight"
        tensors[name] = before[name].clone()

    for change, name in (
        (frozen, "replay.frozen"),
        (one_matrix, "replay.frozen"),
        (nudged, "replay.weights"),
        (other_moment, "replay.moments"),
    ):
        restate(fresh(), 3, change)
        for means in (Means(), Means(threads=2)):
            found = failures(of_step_3(copy, means, chosen=["1", "2"]))
            assert found == {("layer-1", name)}, (change, means)
    restate(fresh(), 2, nudged)  # before the step: the layer would have given something else
    assert failures(of_step_3(copy)) == {("layer-1", "replay.leaving")}
    fresh()
    name_in_ledger(copy, "checkpoint", 3, {"manifest_sha256": "0" * 64})
    assert {name for _, name in failures(of_step_3(copy))} == {"state.not_the_runs"}


def test_what_cannot_be_repeated_is_said(run: Path, copy: Path) -> None:
    """Nothing stored, a piece that there is not, no state to start from."""
    with pytest.raises(ConfigError, match="there is no piece 'layer-x'; this model has embedding, layer-0"):
        of_step_3(run, chosen=["layer-x"])
    shutil.rmtree(copy / "checkpoints" / "step-2")
    [found] = of_step_3(copy)
    assert (found.verdict, found.failure) == (Verdict.unchecked, None)
    assert "no state of step 2 is kept" in found.reason
    ended = fullweight("replay", copy, "--level", "layer", "--boundaries", copy / "boundaries" / "step-3")
    assert ended.statuses == (3,)
    shutil.rmtree(copy / "boundaries")
    pruned = repeat_layers(copy, [], Means())
    assert [(r.step, r.piece, r.verdict) for r in pruned] == [(s, "all", Verdict.unchecked) for s in (3, 5)]
    assert "which the ledger names, are no longer at" in pruned[0].reason
    ended = fullweight("replay", copy, "--level", "layer")
    assert ended.statuses == (3,), ended.output
    name_in_ledger(copy, "boundaries", 3, {"what": "gone"})
    name_in_ledger(copy, "boundaries", 5, {"what": "gone"})
    with pytest.raises(CheckpointError, match=r"boundaries\.every"):
        repeat_layers(copy, [], Means())
