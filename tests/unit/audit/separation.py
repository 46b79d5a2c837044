"""How far honest rounding and small frauds lie apart: the table in docs/evidence.md.

    .venv/bin/python -m tests.unit.audit.separation

trains the run of `cheating.py` (one thread) in each precision with each optimiser, and repeats its windows with
two threads: the first is honest, the others are not. A few minutes.

`near_ties.jsonl.gz` are other samples (sums over twelve named stops), with which a choice in the second step is so
nearly tied that the number of threads decides it (on the processor of the table).
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

from tests.processes import fullweight

from fullweight.audit.again import Means
from fullweight.audit.replay import ReplayResult, replay
from fullweight.audit.windows import Window

WINDOWS = {
    "honest": Window(0, 2),
    "one row of four dropped": Window(2, 4),
    "a matrix frozen for one step of two": Window(4, 6),
    "learning rate 1.25 times as large": Window(6, 8),
}
CASES = [("fp32", "adamw"), ("fp32", "muon"), ("bf16", "adamw"), ("bf16", "muon")]
NEAR_TIES = Path(__file__).parent / "near_ties.jsonl.gz"


def measured(precision: str, optimizer: str, run: Path, samples: Path | None = None) -> dict[str, ReplayResult]:
    """The windows of one run, repeated on another number of threads; `samples` in place of the recipe's own."""
    settings = {
        "train.num_steps": "8",
        "train.precision": precision,
        "train.peak_flops_per_second": "1e12",
        "optimizer.name": optimizer,
        "optimizer.muon.ns_dtype": "float32" if precision == "fp32" else "bfloat16",
        "checkpoint.every": "2",
        "checkpoint.keep": "9",
        "eval.num_samples": "0",
        "eval.every": "100",
        "export.enabled": "false",
    }
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    if samples is not None:
        path = run.parent / "samples.jsonl"
        path.write_bytes(gzip.decompress(samples.read_bytes()))
        chosen += ["--set", f'data.sources=[{{ kind = "file", path = "{path}" }}]']
    call = "tests.unit.audit.cheating:train"
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, call=call)
    assert ended.ok, ended.output
    return dict(zip(WINDOWS, replay(run, list(WINDOWS.values()), Means(threads=2)), strict=True))


def main() -> None:
    """Print the table."""
    print(
        "| precision, optimiser | window | weights | effect | moments | losses | one tensor's effect | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for precision, optimizer, samples in [*((*case, None) for case in CASES), ("fp32", "muon", NEAR_TIES)]:
        with tempfile.TemporaryDirectory() as folder:
            for what, found in measured(precision, optimizer, Path(folder) / "run", samples).items():
                assert found.distance is not None
                counted = [d for d in found.distance.tensors if d.share > found.bound / 100]
                tensor = max((d.effect or 0.0 for d in counted), default=0.0)
                losses = max((d.relative or 0.0 for d in found.differing if "loss" in d.field), default=0.0)
                d = found.distance
                numbers = " | ".join(f"{x:.1e}" for x in (d.weights, d.effect, d.moments, losses, tensor))
                name = f"{precision}, {optimizer}" + ("" if samples is None else ", near ties")
                print(f"| {name} | {what} | {numbers} | {found.verdict} |", flush=True)


if __name__ == "__main__":
    main()
