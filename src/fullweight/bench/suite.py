"""`fullweight bench model`: which measurements run, in which order, and what their numbers mean together.

For every length in turn: the matmul peak, our step, transformers; then the peak once more. Whatever else the
machine does falls on all of them alike. The peak that percentages refer to is the best median of any shape at
any time, so a disturbed matmul cannot flatter the model. Memory is the largest over a length's processes.

A time is the median over a process's steps, averaged over the processes of a length. On a rented machine a process
may be a tenth slower than the next one of its length for as long as it lives. The median over the steps of both
would be the one's or the other's by chance; the mean is half of each, at every length alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from fullweight.bench.measure import BenchConfig
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.flops import model_flops_utilisation, training_flops
from fullweight.train.run_folder import environment

Kind = Literal["matmul", "fullweight", "transformers"]

CONVENTIONS = {
    "step": "ours: forward, backward (next-token, MTP, indexer, balance losses), clipping, optimizer, router "
    "bias, with fp32 masters and moments; transformers: forward and backward of the next-token loss in bf16, "
    "no optimizer",
    "time": "median wall time of a process's timed steps, warm-up left out, of both at least so many and so many "
    "seconds as the settings say; averaged over processes; spread is (slowest - fastest step) / that",
    "memory": "peak resident memory of a fresh process; above baseline: minus what imports alone hold",
    "flops": "exact sparse model FLOPs of training_flops (MTP, indexer loss over selected entries), no "
    "recompute, no padding, no optimizer, over the whole step's time",
    "matmul": "best median of bf16 x @ W.T, W stored [out, in], over shapes and over the whole run",
    "routing": "natural, fresh weights, uniform random tokens",
}


@dataclass(frozen=True)
class Run:
    """One subprocess: its result, or why there is none."""

    kind: Kind
    length: int
    result: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Side:
    """One implementation at one length."""

    seconds: float
    spread: float
    tokens_per_second: float
    peak_bytes: int
    bytes_above_baseline: int
    seconds_by_phase: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One length; a side is None when it did not run or failed (`errors` says why)."""

    length: int
    fullweight: Side | None
    transformers: Side | None
    flops_per_second: float | None
    share_of_matmul: float | None
    speed_ratio: float | None  # our tokens/s over transformers'
    memory_ratio: float | None  # our peak memory over transformers'
    errors: list[str]


@dataclass(frozen=True)
class Summary:
    """What the rows say together. Memory is fitted as fixed + slope x tokens."""

    matmul_flops_per_second: float
    rows: list[Row]
    worst_over_best_flops: float | None
    memory_bytes_per_token: float | None
    memory_fixed_bytes: float | None
    memory_largest_deviation: float | None  # from the line, as a share of the measured peak
    waited_share: float | None  # worst of all measurements: other work on the machine took that much


def plan(config: BenchConfig) -> list[tuple[Kind, int]]:
    """Measurements in order."""
    order: list[tuple[Kind, int]] = []
    for _ in range(config.rounds):
        for length in config.lengths:
            order += [("matmul", length), ("fullweight", length)]
            if length <= config.transformers_up_to:
                order.append(("transformers", length))
    return [*order, ("matmul", config.lengths[-1])]


def run_one(config: BenchConfig, kind: Kind, length: int) -> Run:
    """One measurement in a fresh process; a failure is a result too."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(config.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "fullweight.bench.worker", kind, str(length)],
        input=config.to_json(),
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Run(kind, length, json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -9:
        last = "killed, most likely out of memory"
    return Run(kind, length, None, f"{kind} at {length} tokens: {last}")


def run_suite(config: BenchConfig, report: Callable[[str], None]) -> list[Run]:
    """All measurements; `report` is told what starts.

    Raises ConfigError before the first one when the preset is unknown or the row too long for it.
    """
    architecture = config.architecture()
    if max(config.lengths) > architecture.max_position_embeddings:
        raise ConfigError(
            f"a row of {max(config.lengths)} tokens exceeds max_position_embeddings "
            f"({architecture.max_position_embeddings}) of preset {config.preset}; use a shorter one"
        )
    runs = []
    for kind, length in plan(config):
        report("matmul peak" if kind == "matmul" else f"{kind}, {length:,} tokens")
        runs.append(run_one(config, kind, length))
    return runs


def summarise(config: BenchConfig, runs: list[Run]) -> Summary:
    """Combine the measurements; raises ConfigError when no matmul could be timed."""
    rates = [max(r.result["flops_per_second"].values()) for r in runs if r.kind == "matmul" and r.result]
    if not rates:
        reasons = "; ".join(r.error or "" for r in runs if r.kind == "matmul")
        raise ConfigError(f"the machine's matmul peak could not be measured: {reasons}")
    peak = max(rates)
    rows = [_row(config, length, runs, peak) for length in dict.fromkeys(config.lengths)]
    flops = [row.flops_per_second for row in rows if row.flops_per_second is not None]
    points = [(row.length, row.fullweight.peak_bytes) for row in rows if row.fullweight is not None]
    slope = fixed = deviation = None
    if len(points) > 2:  # a line through two points would always fit
        tokens, memory = np.array(points, dtype=np.float64).T
        slope, fixed = (float(x) for x in np.polyfit(tokens, memory, 1))
        deviation = float(np.max(np.abs(fixed + slope * tokens - memory) / memory))
    waited = [share for run in runs if run.result and (share := run.result["waited_share"]) is not None]
    return Summary(
        matmul_flops_per_second=peak,
        rows=rows,
        worst_over_best_flops=min(flops) / max(flops) if flops else None,
        memory_bytes_per_token=slope,
        memory_fixed_bytes=fixed,
        memory_largest_deviation=deviation,
        waited_share=max(waited, default=None),
    )


def record(config: BenchConfig, runs: list[Run], summary: Summary, stood_on: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to check or repeat the benchmark."""
    return {
        "benchmark": "model",
        **stood_on,
        "settings": config.model_dump(mode="json"),
        "model": config.architecture().to_published(),
        "parameters": config.architecture().num_parameters(mtp=True),
        "conventions": CONVENTIONS,
        "summary": asdict(summary),
        "runs": [asdict(run) for run in runs],
    }


def stands_on(config: BenchConfig) -> dict[str, Any]:
    """Command, commit, versions, machine; raises ConfigError without a commit: a figure needs its code."""
    found = environment(1, torch.device("cpu"))
    if found["commit"] is None:
        raise ConfigError(
            "the code's commit is unknown (its source is not in a git checkout), so a record of its speed "
            "would say nothing; run from a checkout, or without --json"
        )
    return {**found, "threads_per_rank": config.threads}


def _row(config: BenchConfig, length: int, runs: list[Run], peak: float) -> Row:
    ours = _side([r for r in runs if (r.kind, r.length) == ("fullweight", length)])
    theirs = _side([r for r in runs if (r.kind, r.length) == ("transformers", length)])
    rate = None
    if ours is not None:
        flops = training_flops(config.architecture(), config.document_lengths(length)).total
        rate = flops / ours.seconds
    return Row(
        length=length,
        fullweight=ours,
        transformers=theirs,
        flops_per_second=rate,
        share_of_matmul=None if rate is None else model_flops_utilisation(rate, peak),
        speed_ratio=ours.tokens_per_second / theirs.tokens_per_second if ours and theirs else None,
        memory_ratio=ours.peak_bytes / theirs.peak_bytes if ours and theirs else None,
        errors=[r.error for r in runs if r.error is not None and r.length == length],
    )


def _side(runs: list[Run]) -> Side | None:
    results = [run.result for run in runs if run.result is not None]
    if not results:
        return None
    times = [[sum(step.values()) for step in result["steps"]] for result in results]
    seconds = statistics.mean(map(statistics.median, times))
    fastest, slowest = min(map(min, times)), max(map(max, times))
    return Side(
        seconds=seconds,
        spread=(slowest - fastest) / seconds,
        tokens_per_second=runs[0].length / seconds,
        peak_bytes=max(result["peak_bytes"] for result in results),
        bytes_above_baseline=max(result["peak_bytes"] - result["baseline_bytes"] for result in results),
        seconds_by_phase={
            phase: statistics.mean(
                statistics.median(step[phase] for step in result["steps"]) for result in results
            )
            for phase in results[0]["steps"][0]
        },
    )
