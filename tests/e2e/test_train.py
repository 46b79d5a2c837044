"""A whole run from the command line: what it leaves, and that resuming it is exact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tests.e2e.conftest import ROOT, SMOKE, Command, ledger
from transformers import AutoModelForCausalLM, AutoTokenizer

import fullweight as package
from fullweight.checkpoint.generations import listed
from fullweight.data.loader import PackedLoader, batch_digest
from fullweight.data.sources import question_digest, read
from fullweight.data.tokenizer import load_tokenizer
from fullweight.evidence.merkle import root
from fullweight.models.deepseek_v4.flops import Pairs
from fullweight.train.assemble import assemble
from fullweight.train.config import RunConfig
from fullweight.train.loop import joined_for
from fullweight.train.opening import gathered
from fullweight.train.run_folder import RunFolder

SHORT = ["--set", "train.num_steps=6", "--set", "train.precision=fp32", "--set", "eval.num_samples=2"]
SHORT += ["--set", "eval.every=3", "--set", "checkpoint.every=3", "--set", "eval.max_new_tokens=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, fullweight: Command) -> Path:
    """One uninterrupted run with Muon."""
    run = tmp_path_factory.mktemp("runs") / "muon"
    fullweight("train", SMOKE, *SHORT, "--output", run)
    return run


def test_the_run_folder_is_complete(finished: Path) -> None:
    """Everything that section 4 of the run folder's documentation names is there."""
    names = {p.name for p in finished.iterdir()}
    expected = {"config.json", "model.json", "environment.json", "launch.json", "ledger.jsonl", "manifest.json"}
    expected |= {"tokenizer", "checkpoints", "samples", "plots", "export", "report.html", "coverage.json"}
    assert names == expected
    assert [s for s, _ in listed(finished / "checkpoints")] == [3, 6]
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [
        "step-0.json",
        "step-3.json",
        "step-6.json",
    ]


def test_every_step_is_recorded_in_full(finished: Path) -> None:
    """Each line has all components, time by phase and its conventions; held-out loss falls."""
    steps = ledger(finished)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert set(line["loss"]) == {"lm", "mtp", "indexer", "balance"}
        assert set(line["seconds"]) == {"data", "forward", "backward", "optimizer", "total"}
        assert line["routing"] == "natural"
        assert line["parameters"] == {"total": 522092, "trained": 522092}
        assert line["without_gradient"] == [], "each step of the recipe reaches every parameter"
        assert line["tokens"]["real"] + line["tokens"]["padding"] == 512
        assert line["mfu_convention"]
        assert line["peak"]["source"]
    losses = [e["loss"]["lm"] for e in ledger(finished, "eval")]
    assert losses[-1] < losses[0] - 0.3


def test_the_record_can_be_recomputed(finished: Path) -> None:
    """The chain by hashing lines, batches by a fresh loader of the recorded settings, losses from their bits."""
    raw = (finished / "ledger.jsonl").read_bytes().splitlines()
    lines = [json.loads(line) for line in raw]
    assert [line["previous"] for line in lines] == ["0" * 64, *(sha256(line).hexdigest() for line in raw[:-1])]
    start, manifest = lines[0], json.loads((finished / "manifest.json").read_text())
    assert (start["what"], start["segment"], start["run"]) == ("start", 0, manifest["run"])
    assert start["manifest_sha256"] == sha256((finished / "manifest.json").read_bytes()).hexdigest()

    config = RunConfig.resolve(manifest["config"], "manifest.json")
    architecture = config.model.architecture()
    tokenizer = load_tokenizer(str(finished / "tokenizer"))
    assert manifest["data"]["tokenizer_sha256"] == tokenizer.sha256
    with PackedLoader(config.data, tokenizer) as loader:
        for line in ledger(finished):
            rows = [next(loader) for _ in range(config.train.rows_per_step)]
            digests = b"".join(bytes.fromhex(batch_digest(row)) for row in rows)
            position = loader.state_dict()
            lengths = [n for row in rows for n in row.layout.document_lengths[: row.layout.num_documents]]
            pairs = asdict(Pairs.of(architecture, lengths))
            assert pairs.pop("tokens") == line["tokens"]["real"] == sum(lengths)
            seen = (min(t + 1, architecture.sliding_window) for length in lengths for t in range(length))
            assert pairs["window"] == sum(seen)
            assert line["batch"] == {
                "pairs": pairs,
                "digest": sha256(digests).hexdigest(),
                "rows": len(rows),
                "samples": sum(len(row.sample_ids) for row in rows),
                "epoch": position["epoch"],
                "row": position["row"],
            }
            for name, value in {**line["loss"], "total": line["total_loss"]}.items():
                assert bytes.fromhex(line["loss_hex"][name]) == struct.pack(">f", value)
            assert line["power"]["source"] == "unknown" or line["power"]["watts"] > 0
    split: dict[bool, list[bytes]] = {True: [], False: []}
    for digest, record in {r.digest: r for source in config.data.sources for r in read(source)}.items():
        question = bytes.fromhex(question_digest(record.sample))
        split[int.from_bytes(question[:8], "little") < 0.1 * 2**64].append(bytes.fromhex(digest))
    for side, digests in (("train", split[False]), ("held_out", split[True])):
        assert manifest["data"][side] == {"number": len(digests), "merkle_root": root(digests)}


def test_the_first_weights_can_be_made_again(finished: Path, tmp_path: Path) -> None:
    """From the recorded configuration, in another process: same seed, same root; another seed, another root."""
    manifest = json.loads((finished / "manifest.json").read_text())
    roots = []
    for seed in (0, 1):
        config = RunConfig.resolve(
            manifest["config"] | {"train": manifest["config"]["train"] | {"seed": seed}}, ""
        )
        with joined_for(config) as ranks:
            run = assemble(config, RunFolder(tmp_path), ranks)
            roots.append(gathered(run).weights_root)
            run.state.loader.close()
    assert roots[0] == manifest["initial"]["weights_root"] != roots[1]


def test_the_end_is_recorded(finished: Path) -> None:
    """Checkpoints under their steps, what was exported, and the totals."""
    events = ledger(finished, "event")
    assert [(e["step"], e["generation"]) for e in events if e["what"] == "checkpoint"] == [
        (3, "step-3"),
        (6, "step-6"),
    ]
    assert [e["what"] for e in events[-2:]] == ["export", "finish"]
    receipt = (finished / "export" / "receipt.json").read_bytes()
    assert events[-2]["receipt_sha256"] == sha256(receipt).hexdigest()
    assert (events[-1]["steps"], events[-1]["tokens"]) == (6, ledger(finished)[-1]["tokens"]["so_far"])
    samples = {(e["samples"], e["num_samples"], e["num_questions"]) for e in ledger(finished, "eval")}
    assert len(samples) == 1, "every evaluation is of the same samples"


def test_transformers_loads_the_export_and_agrees(finished: Path) -> None:
    """Same logits in fp32 from the published names, and the same tokens from the saved tokenizer."""
    export = finished / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("Sue buys 6 wheels at 3 each.", add_special_tokens=False)["input_ids"] * 4
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids]), use_cache=False).logits[0]
    [found] = package.load(export).logits([ids])
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_in_a_fresh_process_is_bit_exact(
    optimizer: str, finished: Path, tmp_path: Path, fullweight: Command
) -> None:
    """A run that died after step 3 ends with the bits of one that did not: numbers, weights and moments."""
    whole = finished
    if optimizer == "adamw":
        whole = tmp_path / "whole"
        fullweight("train", SMOKE, *SHORT, "--set", "optimizer.name=adamw", "--output", whole)
    died = tmp_path / "died"
    shutil.copytree(whole, died)
    shutil.rmtree(died / "checkpoints" / "step-6")
    shutil.rmtree(died / "export")
    with (died / "ledger.jsonl").open("a") as stream:
        stream.write('{"kind":"step","st')
    refused = fullweight("resume", died, check=1)
    assert "latest names step-6, which is not there" in refused.stderr
    fullweight("resume", died, "--on-corrupt", "previous")

    for kind, keys in (
        ("step", ("step", "loss", "loss_hex", "grad_norm", "tokens", "experts", "batch")),
        ("eval", ("loss", "score", "samples")),
    ):
        one, other = ([{k: e[k] for k in keys} for e in ledger(r, kind)] for r in (whole, died))
        assert one == other
    [event] = [e for e in ledger(died, "event") if e["what"] == "resume"]
    assert (event["generation"], event["superseded_steps"]) == ("step-3", 3)
    assert not {"code", "environment"} & event.keys(), "the same code on the same machine"
    before = (whole / "ledger.jsonl").read_bytes()
    assert (died / "ledger.jsonl").read_bytes().startswith(before), "nothing that was recorded is gone"
    for part in ("export", "checkpoints/step-6"):
        for path in (whole / part).glob("*"):
            if path.suffix in (".distcp", ".safetensors"):
                assert path.read_bytes() == (died / part / path.name).read_bytes(), path.name


def test_interrupting_saves_and_says_how_to_go_on(tmp_path: Path, fullweight: Command) -> None:
    """SIGINT mid-run: exit status 130, a checkpoint of the last finished step, and resume continues there."""
    run = tmp_path / "run"
    arguments = ["train", SMOKE, *SHORT, "--set", "train.num_steps=400", "--set", "eval.every=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fullweight", *map(str, arguments), "--output", str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (run / "ledger.jsonl").is_file() or len(ledger_lines(run)) < 4:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"fullweight resume {run}" in output
    assert "Traceback" not in output
    step, _ = listed(run / "checkpoints")[-1]
    assert step == ledger(run)[-1]["step"]

    config = json.loads((run / "config.json").read_text())
    config["train"]["num_steps"] = step + 1
    (run / "config.json").write_text(json.dumps(config))
    assert "train.num_steps 400 -> " in fullweight("resume", run).stdout
    assert [s["step"] for s in ledger(run)] == list(range(1, step + 2))


def ledger_lines(run: Path) -> list[str]:
    return (run / "ledger.jsonl").read_text().splitlines()


def test_generate_answers_from_a_run_a_checkpoint_and_an_export(
    finished: Path, tmp_path: Path, fullweight: Command
) -> None:
    """The three folders that hold the weights give text; a run without export uses its newest checkpoint."""
    ask = ["--prompt", "Sue buys 6 wheels at 3 each. What is the total?", "--max-new-tokens", "4"]
    whole = fullweight("generate", finished, *ask).stdout
    assert whole == fullweight("generate", finished / "export", *ask).stdout
    unfinished = tmp_path / "run"
    shutil.copytree(finished, unfinished, ignore=shutil.ignore_patterns("export"))
    fullweight("generate", unfinished, *ask)


def test_init_writes_a_checkpoint_that_a_run_can_start_from(
    finished: Path, tmp_path: Path, fullweight: Command
) -> None:
    """`init` then training from that folder: same seed, same bytes; the run starts from those weights."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        fullweight(
            "init", "--config", finished / "model.json", "--out", folder, "--seed", "3", "--dtype", "float32"
        )
    for path in folders[0].glob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    values = SMOKE.read_text().replace('preset = "tiny"', f'checkpoint = "{folders[0]}"')
    values = values.replace("[tokenizer]\nvocab_size = 448\nnum_samples = 300\n", "")
    values = values.replace("[data]", f'[data]\ntokenizer = "{finished / "tokenizer"}"')
    recipe = tmp_path / "from_checkpoint.toml"
    recipe.write_text(values)
    fullweight(
        "train",
        recipe,
        *SHORT,
        "--set",
        "train.num_steps=1",
        "--set",
        "schedule.warmup_steps=1",
        "--output",
        tmp_path / "run",
    )
    assert len(ledger(tmp_path / "run")) == 1
