"""The benchmark: its arithmetic on made-up measurements, its processes and errors on real ones."""

import json
import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fullweight.bench.measure import BenchConfig, Waiting, peak_bytes, resident_bytes
from fullweight.bench.suite import Run, plan, record, run_one, run_suite, summarise
from fullweight.cli.bench import bench_app, print_summary
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.flops import training_flops

GB = 10**9


def _matmul(*rates: float, waited: float | None = 0.01) -> Run:
    result = {"flops_per_second": dict(enumerate(rates)), "spread": {}, "waited_share": waited}
    return Run("matmul", 100, result)


def _steps(kind: str, length: int, seconds: list[float], peak: float, baseline: float = 0.25 * GB) -> Run:
    steps = [{"forward": s / 4, "backward": s * 3 / 4} for s in seconds]
    result = {"steps": steps, "peak_bytes": peak, "baseline_bytes": baseline, "waited_share": 0.02}
    return Run(kind, length, result)  # type: ignore[arg-type]


def test_summary_arithmetic() -> None:
    """The mean of the rounds' medians, the largest memory, the best matmul as peak, ratios, the memory line."""
    config = BenchConfig(lengths=(100, 200, 400), preset="tiny")
    runs = [
        _matmul(300 * GB, 100 * GB),
        _steps("fullweight", 100, [1.0, 1.0, 1.0, 1.5], 1.0 * GB),
        _steps("fullweight", 100, [3.0], 1.1 * GB),  # a second round, which counts as much as the first
        _steps("transformers", 100, [8.0], 4.4 * GB),
        _steps("fullweight", 200, [4.0], 1.2 * GB),
        Run("transformers", 200, None, "transformers at 200 tokens: killed, most likely out of memory"),
        _steps("fullweight", 400, [16.0], 1.4 * GB),
        _matmul(200 * GB, 400 * GB),
    ]
    summary = summarise(config, runs)
    assert summary.matmul_flops_per_second == 400 * GB
    first, second, third = summary.rows
    assert first.fullweight is not None
    assert first.fullweight.seconds == 2.0
    assert first.fullweight.spread == 1.0
    assert first.fullweight.tokens_per_second == 50.0
    assert first.fullweight.peak_bytes == 1.1 * GB
    assert first.fullweight.bytes_above_baseline == pytest.approx(0.85 * GB)
    assert first.fullweight.seconds_by_phase == {"forward": 0.5, "backward": 1.5}
    assert first.speed_ratio == 4.0
    assert first.memory_ratio == pytest.approx(0.25)
    flops = training_flops(config.architecture(), [100]).total
    assert first.flops_per_second == flops / 2.0
    assert first.share_of_matmul == pytest.approx(flops / 2.0 / (400 * GB))
    assert second.speed_ratio is None
    assert second.errors == ["transformers at 200 tokens: killed, most likely out of memory"]
    assert third.transformers is None
    # 1.0 GB + 1 MB a token fits exactly
    assert summary.memory_bytes_per_token == pytest.approx(1e6)
    assert summary.memory_fixed_bytes == pytest.approx(1e9)
    assert summary.memory_largest_deviation == pytest.approx(0, abs=1e-9)
    assert summary.worst_over_best_flops == pytest.approx(third.flops_per_second / second.flops_per_second)
    written = json.loads(json.dumps(record(config, runs, summary, {"commit": "abc"})))
    assert written["commit"] == "abc"
    assert len(written["runs"]) == len(runs)
    console = Console(file=StringIO(), width=80)
    print_summary(summary, console, "adamw")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[out, in]" in text  # not swallowed as markup
    assert "…" not in text  # fits a terminal
    assert "failed: transformers at 200 tokens: killed" in text
    assert "disturbed" not in text


def test_other_work_on_the_machine_shows() -> None:
    """The worst share of time spent waiting for a processor is kept, and said when it spoils the figures."""
    config = BenchConfig(lengths=(100,), preset="tiny")
    for worst, shown in ((0.4, True), (0.03, False), (None, False)):
        runs = [_matmul(GB, waited=worst), _steps("fullweight", 100, [1.0], GB)]
        summary = summarise(config, runs)
        assert summary.waited_share == (worst or 0.02)
        console = Console(file=StringIO(), width=80)
        print_summary(summary, console, "adamw")
        assert ("disturbed: up to 40%" in console.file.getvalue()) is shown  # type: ignore[attr-defined]


def test_memory_that_is_not_linear_shows() -> None:
    """Quadratic memory is reported as a deviation from the line; two lengths prove nothing."""
    config = BenchConfig(lengths=(100, 200, 400), preset="tiny")
    runs = [_matmul(GB), *(_steps("fullweight", n, [1.0], 1e5 * n * n) for n in (100, 200, 400))]
    deviation = summarise(config, runs).memory_largest_deviation
    assert deviation is not None
    assert deviation > 0.25
    assert summarise(config, runs[:3]).memory_bytes_per_token is None


def test_plan_interleaves() -> None:
    """Matmul, ours and theirs alternate length by length; the peak is measured once more at the end."""
    config = BenchConfig(lengths=(8, 64), transformers_up_to=8, rounds=2)
    kinds = "".join(kind[0] for kind, _ in plan(config))
    assert kinds == "mft" + "mf" + "mft" + "mf" + "m"


def test_documents_split_the_row_evenly() -> None:
    """No token is lost and none is made up, also with more documents than tokens."""
    assert BenchConfig(documents=3).document_lengths(10) == [4, 3, 3]
    assert BenchConfig(documents=9).document_lengths(2) == [1, 1]


def test_peak_memory_is_this_process_alone() -> None:
    """A child of a large parent does not inherit its parent's peak, and freed memory stays in the peak."""
    code = (
        "from fullweight.bench.measure import peak_bytes, resident_bytes\n"
        "before = peak_bytes(); block = bytearray(200_000_000); del block\n"
        "print(before, peak_bytes(), resident_bytes())"
    )
    ballast = bytearray(os.urandom(1 << 20) * 700)  # 0.7 GB in this process while the child runs
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held = len(ballast)
    assert peak_bytes() > held
    before, after, now = map(int, done.stdout.split())
    assert before < held
    assert 150_000_000 < after - before < 250_000_000
    assert now < after
    assert resident_bytes() <= peak_bytes()


def test_waiting_counts_only_time_ready_to_run() -> None:
    """A sleeping thread does not wait for a processor."""
    waiting = Waiting()
    time.sleep(0.2)
    share = waiting.share()
    assert share is None or share < 0.5


def test_a_real_run_of_every_kind() -> None:
    """The tiny model through the real step, transformers and matmul, in real subprocesses."""
    config = BenchConfig(
        preset="tiny", lengths=(40,), documents=2, repeats=2, warm_up=0, seconds=0, optimizer="muon"
    )
    runs = run_suite(config, lambda _: None)
    assert [run.error for run in runs] == [None] * 4
    summary = summarise(config, runs)
    (row,) = summary.rows
    assert row.fullweight is not None
    assert row.transformers is not None
    assert set(row.fullweight.seconds_by_phase) == {"data", "forward", "backward", "optimizer"}
    assert set(row.transformers.seconds_by_phase) == {"forward", "backward"}
    assert row.share_of_matmul is not None
    assert 0 < row.share_of_matmul < 1
    for side in (row.fullweight, row.transformers):
        assert 0 < side.bytes_above_baseline < side.peak_bytes
    by_kind = {run.kind: run.result for run in runs}
    assert by_kind["fullweight"] is not None
    assert by_kind["transformers"] is not None
    # two independent models, both fresh: each predicts about uniformly over 512 tokens, whose loss is ln 512
    for kind in ("fullweight", "transformers"):
        result = by_kind[kind]
        assert result is not None
        assert result["losses"]["lm"] == pytest.approx(6.24, abs=0.3)
    assert {"lm", "mtp", "indexer", "balance"} <= set(by_kind["fullweight"]["losses"])


def test_a_failing_measurement_says_why() -> None:
    """A worker's mistake comes back as one line, not as a traceback or a crash of the suite."""
    run = run_one(BenchConfig.model_construct(preset="tinny", threads=1), "fullweight", 8)
    assert run.result is None
    assert run.error is not None
    assert run.error.startswith("fullweight at 8 tokens: unknown model preset 'tinny'; did you mean 'tiny'?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1k"], "--lengths takes numbers such as 1024,4096; found '1k'"),
        (["--lengths", "0"], "lengths.0: Input should be greater than or equal to 1"),
        (["--preset", "tinny"], "unknown model preset 'tinny'; did you mean 'tiny'?"),
        (["--optimizer", "sgd"], "optimizer: Input should be 'adamw' or 'muon' (found 'sgd')"),
        (["--lengths", "2000000"], "a row of 2000000 tokens exceeds max_position_embeddings"),
        (["--json", "nowhere/bench.json"], "to write bench.json in; create it"),
    ],
)
def test_mistakes_stop_before_anything_runs(arguments: list[str], message: str) -> None:
    """Each raises the one error that the command line prints."""
    result = CliRunner().invoke(bench_app, ["model", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_record_needs_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside a git checkout --json is refused before measuring."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    result = CliRunner().invoke(bench_app, ["model", "--json", str(tmp_path / "bench.json")])
    assert isinstance(result.exception, ConfigError)
    assert "commit is unknown" in str(result.exception)
    assert not list(tmp_path.iterdir())
