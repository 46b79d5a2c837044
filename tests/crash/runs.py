"""The run that every crash test interrupts, and what it must come to in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.processes import Ended, fullweight

from fullweight.checkpoint.generations import choose, listed
from fullweight.checkpoint.manifest import verify
from fullweight.core.crash import VARIABLE
from fullweight.evidence.ledger import mend, read
from fullweight.evidence.manifest import require_bound

RECIPE = "recipes/tiny_smoke.toml"
SETTINGS = [
    "train.num_steps=8",
    "train.precision=fp32",
    "train.peak_flops_per_second=1e12",
    "eval.every=8",
    "eval.num_samples=0",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "checkpoint.retry_seconds=0",
    "checkpoint.max_failures=2",
    "export.enabled=false",
]


def train(folder: Path, ranks: int = 1, crash: str = "", settings: tuple[str, ...] = ()) -> Ended:
    """A run of 8 steps saved after each second one, killed at the crash point."""
    chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return fullweight("train", RECIPE, *chosen, "--output", folder, ranks=ranks, environment={VARIABLE: crash})


def resume(folder: Path, ranks: int = 1, *options: str, crash: str = "") -> Ended:
    """Continue it, killed at the crash point if one is given."""
    return fullweight("resume", folder, *options, ranks=ranks, environment={VARIABLE: crash})


def lines(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Ledger lines of one kind."""
    entries = list(read(folder / "ledger.jsonl"))
    return [entry for entry in entries if entry["kind"] == kind]


def assert_same_in_the_end(folder: Path, expected: Path) -> None:
    """Bit for bit the run that nothing interrupted: every step's numbers, held-out loss, the whole last state."""
    for kind, keys in (
        ("step", ("step", "loss", "grad_norm", "tokens", "experts", "batch")),
        ("eval", ("step", "loss")),
    ):
        one, other = ([{k: e[k] for k in keys} for e in lines(f, kind)] for f in (folder, expected))
        assert one == other
    newest, wanted = (choose(f / "checkpoints").generation for f in (folder, expected))
    assert newest.step == wanted.step == 8
    assert newest.manifest.facts.position == wanted.manifest.facts.position
    shards = [
        {name: entry for name, entry in g.manifest.files.items() if name.endswith(".distcp")}
        for g in (newest, wanted)
    ]
    assert shards[0] == shards[1]
    for _, path in listed(folder / "checkpoints"):
        verify(path)
    mend(folder / "ledger.jsonl")  # refuses a chain with a gap
    require_bound(folder / "manifest.json", folder / "ledger.jsonl")
    left = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith((".writing", ".removing"))]
    assert left == []
