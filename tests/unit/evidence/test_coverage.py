"""Coverage of honest runs and of runs that were tampered with: each fraud is named, and honest ones pass."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import fullweight
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.export import as_stored
from fullweight.checkpoint.generations import newest
from fullweight.checkpoint.hf import export_checkpoint
from fullweight.checkpoint.manifest import Facts, Generation, verify
from fullweight.checkpoint.plan import Output
from fullweight.checkpoint.published import published_tensors
from fullweight.evidence.coverage import published_parameters
from fullweight.evidence.coverage_report import differences, report
from fullweight.evidence.kinds import kind_of, layer_of
from fullweight.evidence.tensor_coverage import cover
from fullweight.models.deepseek_v4.config import PRESETS, DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import stacks
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.train.coverage import measure_run
from fullweight.train.run_folder import RunFolder

TINY = DeepSeekV4Config.preset("tiny")
SETTINGS = ["train.num_steps=5", "eval.num_samples=0", "schedule.kind=constant"]
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short honest run with each optimiser."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for optimizer in ("muon", "adamw"):
        found[optimizer] = folder / optimizer
        settings = [word for s in (*SETTINGS, f"optimizer.name={optimizer}") for word in ("--set", s)]
        done = fullweight("train", "recipes/tiny_smoke.toml", *settings, "--output", found[optimizer])
        assert done.ok, done.output
        assert "full-parameter: supported" in done.output
    return found


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    """What the runs began with, by our names."""
    return initialise(DeepSeekV4(TINY, ops="reference"), 0).state_dict()


def generation_of(run: Path) -> Generation:
    return verify(newest(run / "checkpoints"))


def tampered(
    run: Path, place: Path, change: Change, described: Callable[[dict[str, Any]], None] = lambda values: None
) -> RunFolder:
    """A copy of a run, without its export, whose newest checkpoint was changed and saved again, sealed and all."""
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoints", "export"))
    generation = generation_of(run)
    tensors = dict(store.stream(generation, sorted(store.contents(generation))))
    change(tensors)
    facts = generation.manifest.facts.model_dump(mode="json")
    described(facts)
    store.save(place / "checkpoints", tensors, Facts.resolve(facts))
    return RunFolder(place)


def judged(folder: RunFolder) -> tuple[str, dict[str, list[str]]]:
    """The verdict, and the names of each finding."""
    content = report(measure_run(folder))
    return content["claim"]["full_parameter"], {f["code"]: f["names"] for f in content["findings"]}


# ---- honest runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_honest_run_is_covered(optimizer: str, runs: dict[str, Path], initial: dict[str, Tensor]) -> None:
    """Sums are the parameter count; tokens by row and expert are all tokens; changes are those of the tensors."""
    run = runs[optimizer]
    content = json.loads((run / "coverage.json").read_text())
    total = TINY.num_parameters(mtp=True)
    assert content["claim"] == {"full_parameter": "supported"}
    assert content["parameters"] == {"total": total, "trained": total}
    assert content["first_weights"]["as_recorded"] is True
    for parts in (content["tensors"], content["kinds"].values(), content["layers"].values()):
        assert sum(part["elements"] for part in parts) == total == content["totals"]["elements"]
    generation = generation_of(run)
    held = dict(store.stream(generation, sorted(store.contents(generation))))
    tokens = generation.manifest.facts.position["tokens"]
    assert content["tokens"] == content["tokens_by_row"]["tokens"] == int(held["coverage.seen"].sum()) == tokens
    routed = held["coverage.routed"]
    assert routed.shape == (5, TINY.n_routed_experts)
    assert routed[:4].sum(1).tolist() == [tokens * TINY.num_experts_per_tok] * 4
    assert 0 < int(routed[4].sum()) < tokens * TINY.num_experts_per_tok  # no next token at a document's end
    assert [e["routed_tokens"] for e in content["experts"]] == routed.flatten().tolist()
    changed = sum(
        int((held[f"model.{name}"] != first).sum())
        for name, first in initial.items()
        if not name.endswith(("gate.bias", "tid2eid"))
    )
    assert content["totals"]["changed_master"] == changed
    assert content["totals"]["changed_export"] < changed
    moments = held["optimizer.adamw.embed.weight.exp_avg_sq"] > 0
    rows = next(t for t in content["tensors"] if t["name"] == "embed.weight")
    assert rows["reached"] == int(moments.sum())
    assert content["tokens_by_row"]["reached"] == int(moments.any(1).sum())
    assert not (moments.any(1) & (held["coverage.seen"] == 0)).any()


def test_the_command_measures_again_and_agrees(runs: dict[str, Path], tmp_path: Path) -> None:
    """`fullweight coverage` has status 0 and the numbers that the run wrote; an edited file is told apart."""
    again = tmp_path / "again.json"
    done = fullweight("coverage", runs["muon"], "--json", again, "--by", "layer")
    assert done.ok, done.output
    assert "layers.3" in done.output
    written, measured = (json.loads(path.read_text()) for path in (runs["muon"] / "coverage.json", again))
    assert differences(written, measured) == []
    written["export_compared"] = not written["export_compared"]
    assert differences(written, measured) == [], "where it was measured is no difference"
    written["tensors"][3]["changed_master"] -= 1
    [found] = differences(written, measured)
    assert found.startswith(f"tensors[{written['tensors'][3]['name']}].changed_master: ")


def test_rows_of_unseen_tokens_are_an_exception_with_their_number(runs: dict[str, Path]) -> None:
    """The tokenizer of 448 leaves at least 64 of 512 rows without a token, and the claim stands."""
    content = json.loads((runs["muon"] / "coverage.json").read_text())
    found = next(f for f in content["findings"] if f["code"] == "unseen_rows")
    assert found["weight"] == "exception"
    assert found["count"] == 512 - content["tokens_by_row"]["seen"] >= 64


# ---- tampering ----------------------------------------------------------------------------------------


def test_a_matrix_put_back_is_named(runs: dict[str, Path], initial: dict[str, Tensor], tmp_path: Path) -> None:
    """One matrix as it began, its moments as they were: the claim is refuted with its name, and status 1."""
    name = "layers.1.attn.wq_b.weight"
    folder = tampered(runs["muon"], tmp_path / "run", lambda t: t.update({f"model.{name}": initial[name]}))
    status, findings = judged(folder)
    assert status == "refuted"
    assert findings["frozen_tensor"] == [name]
    done = fullweight("coverage", folder.root)
    assert done.statuses == (1,)
    assert name in done.output


def test_a_merged_adapter_is_named(runs: dict[str, Path], initial: dict[str, Tensor], tmp_path: Path) -> None:
    """Every attention matrix and one expert are what they began as plus a product of rank 8."""
    generator = torch.Generator().manual_seed(3)

    def product(rows: int, columns: int) -> Tensor:
        left, right = (torch.randn(rows, 8, generator=generator), torch.randn(8, columns, generator=generator))
        return 1e-3 * left @ right

    attention = [f"layers.{i}.attn.{m}.weight" for i in range(4) for m in ("wq_a", "wq_b", "wkv", "wo_b")]

    def merge(tensors: dict[str, Tensor]) -> None:
        for name in attention:
            tensors[f"model.{name}"] = initial[name] + product(*initial[name].shape)
        down = "layers.2.ffn.experts.down"
        tensors[f"model.{down}"][5] = initial[down][5] + product(*initial[down].shape[1:])

    status, findings = judged(tampered(runs["adamw"], tmp_path / "run", merge))
    assert status == "refuted"
    assert sorted(findings["low_rank"]) == sorted([*attention, "layers.2.ffn.experts.5.w2.weight"])


@pytest.mark.parametrize("routed", [False, True])
def test_an_expert_without_tokens_is_an_exception_and_one_with_is_not(
    routed: bool, runs: dict[str, Path], initial: dict[str, Tensor], tmp_path: Path
) -> None:
    """Expert 3 of layer 2 has neither gradient nor change; whether tokens were routed to it decides."""

    def silence(tensors: dict[str, Tensor]) -> None:
        for part in ("gate_up", "down"):
            name = f"layers.2.ffn.experts.{part}"
            tensors[f"model.{name}"][3] = initial[name][3]
            tensors[f"optimizer.muon.{name}.momentum"][3] = 0
        if not routed:
            tensors["coverage.routed"][2, 3] = 0

    status, findings = judged(tampered(runs["muon"], tmp_path / "run", silence))
    expert = "layers.2.ffn.experts.3"
    matrices = [f"{expert}.w{i}.weight" for i in (1, 2, 3)]
    if routed:
        assert status == "refuted"
        assert findings["not_reached"] == findings["frozen_tensor"] == matrices
    else:
        assert status == "supported"
        assert findings["unrouted_experts"] == [expert]


def test_what_the_recipe_freezes_has_to_stay(
    runs: dict[str, Path], initial: dict[str, Tensor], tmp_path: Path
) -> None:
    """A declared frozen tensor leaves the claim unsupported; one that changed all the same refutes it."""

    def declare(facts: dict[str, Any]) -> None:
        facts["config"]["train"]["frozen"] = ["layers.0.attn.*"]

    def restore(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".layers.0.attn." in n]:
            if name.startswith("model."):
                tensors[name] = initial[name.removeprefix("model.")]
            else:
                del tensors[name]

    status, findings = judged(tampered(runs["muon"], tmp_path / "honest", restore, declare))
    assert status == "unsupported"
    assert "layers.0.attn.wo_a.weight" in findings["declared_frozen"]
    status, findings = judged(tampered(runs["muon"], tmp_path / "changed", lambda tensors: None, declare))
    assert status == "refuted"
    assert findings["changed_though_frozen"] == findings["declared_frozen"]


def test_other_first_weights_do_not_pass(runs: dict[str, Path], tmp_path: Path) -> None:
    """Under another seed all would have changed; the hash table, which no step changes, tells."""

    def reseed(facts: dict[str, Any]) -> None:
        facts["config"]["train"]["seed"] = 1

    status, findings = judged(tampered(runs["muon"], tmp_path / "run", lambda tensors: None, reseed))
    assert status == "refuted"
    assert findings["changed_though_frozen"] == ["layers.0.ffn.gate.tid2eid"]
    assert "first_weights_differ" in findings


def test_a_weight_that_is_no_number_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    """One NaN in one matrix."""

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.attn.wkv.weight"][0, 0] = math.nan

    status, findings = judged(tampered(runs["muon"], tmp_path / "run", poison))
    assert status == "refuted"
    assert findings["non_finite"] == ["layers.3.attn.wkv.weight"]


def test_an_export_of_the_first_weights_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    """What an adapter-only training exports: the base as it was. Adapters beside it make no whole model."""
    place = tmp_path / "run"
    shutil.copytree(runs["muon"], place)
    assert report(measure_run(RunFolder(place)))["export_compared"]
    shutil.rmtree(place / "export")
    export_checkpoint(initialise(DeepSeekV4(TINY, ops="reference"), 0), place / "export")
    content = report(measure_run(RunFolder(place)))
    finding = content["findings"][0]
    assert content["claim"]["full_parameter"] == "refuted"
    assert finding["code"] == "export_differs"
    assert "as the run began" in finding["text"]
    assert finding["count"] > 200
    shutil.rmtree(place / "export")
    (place / "export").mkdir()
    status, findings = judged(RunFolder(place))
    assert status == "refuted"
    assert "export_not_whole" in findings


def test_a_state_without_counts_is_not_judged(runs: dict[str, Path], tmp_path: Path) -> None:
    """Without tokens by expert nothing says whether an expert could have trained."""

    def forget(tensors: dict[str, Tensor]) -> None:
        del tensors["coverage.routed"], tensors["coverage.seen"]

    folder = tampered(runs["muon"], tmp_path / "run", forget)
    assert judged(folder)[0] == "not checkable"
    assert fullweight("coverage", folder.root).statuses == (3,)


# ---- definitions --------------------------------------------------------------------------------------


def test_changes_are_counted_as_each_dtype_shows_them() -> None:
    """1 becomes 1, 1 + 2^-20, 1 + 2^-6 and 2: three changes in fp32, two in BF16, one in FP8 and in FP4."""
    first = torch.ones(1, 4)
    now = torch.tensor([[1.0, 1 + 2**-20, 1 + 2**-6, 2.0]])
    reached = torch.tensor([[False, True, True, True]])
    counts = []
    for storage in ("F32", "BF16", "F8_E4M3", "FP4"):
        output = Output("x.weight", (), storage, None if storage in ("F32", "BF16") else "x.scale")
        found = cover(
            "layers.0.attn.wq_a.weight",
            now,
            first,
            reached,
            True,
            lambda rows, start, output=output: as_stored(output, rows, start, None),
        )
        counts.append(found.sums.changed_export)
        assert (found.sums.changed_master, found.sums.changed_bf16, found.sums.reached) == (3, 2, 3)
        told = found.as_dict()
        assert told["l2_change"] == pytest.approx(math.sqrt(1 + 2**-12 + 2**-40), rel=1e-5)
        assert told["relative_change"] == pytest.approx(told["l2_change"] / 2, rel=1e-5)
        assert told["largest_change"] == 1.0
    assert counts == [3, 2, 1, 1]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_published_names_add_up_to_the_parameter_count(preset: str) -> None:
    """Of every preset, Flash and Pro by arithmetic alone; every name has a kind, and every layer is there."""
    config = DeepSeekV4Config.preset(preset)
    parameters = published_parameters(config)
    assert sum(math.prod(tensor.shape) for tensor in parameters) == config.num_parameters(mtp=True)
    kinds: dict[str, int] = {}
    for tensor in parameters:
        kinds[kind_of(tensor.name)] = kinds.get(kind_of(tensor.name), 0) + math.prod(tensor.shape)
    assert sum(kinds.values()) == config.num_parameters(mtp=True)
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    one = 3 * config.hidden_size * config.moe_intermediate_size
    assert kinds["routed experts"] == blocks * config.n_routed_experts * one
    assert kinds["embedding"] == kinds["head"] == config.vocab_size * config.hidden_size
    layers = {layer_of(tensor.name) for tensor in published_tensors(config)}
    assert len(layers) == blocks + 2
    stacked = {name for stack in stacks(config) for name in stack.names()}
    assert stacked <= {tensor.name for tensor in parameters}
