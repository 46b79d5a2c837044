"""A state goes from one layout of ranks to another without changing a bit.

The state of a run whose experts are dealt is restored and written again under other layouts, and each generation
is compared with the first, tensor by tensor: weights, moments, counters, generators, place in the data.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.processes import fullweight

from fullweight.checkpoint import store
from fullweight.checkpoint.compare import compare
from fullweight.checkpoint.generations import OnCorrupt, choose, newest
from fullweight.checkpoint.manifest import verify
from fullweight.core.config import apply_overrides
from fullweight.parallel.mesh import joined
from fullweight.train import resuming
from fullweight.train.assemble import assemble
from fullweight.train.config import RunConfig
from fullweight.train.loop import load_config
from fullweight.train.run_folder import RunFolder
from fullweight.train.saving import facts

SETTINGS = [
    "train.num_steps=2",
    "train.rows_per_step=4",
    "train.peak_flops_per_second=1e12",
    "data.row_tokens=128",
    "data.too_long=truncate",
    "eval.num_samples=0",
    "export.enabled=false",
    "parallel.expert=2",
]


def restore_and_write(arguments: list[str]) -> int:
    """On every rank: become the newest state of a run or folder, under other settings, and write it elsewhere."""
    folder, target, *settings = arguments
    config = load_config(RunFolder(Path(folder)))
    config = RunConfig.resolve(apply_overrides(config.model_dump(mode="json"), settings), "test")
    with joined(config.train.device) as ranks:
        there = Path(target)
        run_folder = RunFolder(Path(folder))
        choice = choose(there) if there.exists() else resuming.choose(config, run_folder, OnCorrupt.refuse)
        run = assemble(config, run_folder, ranks, run_folder.tokenizer)
        run.state.restore(choice.generation)
        store.save(there, run.state.tensors(), facts(run, None))
        run.state.loader.close()
    return 0


PATHS = {
    "two plain ranks": ((2, "expert=1"),),
    "replicas, then one expert rank each": ((4, "replicate=2", "expert=2"), (4, "expert=4")),
    "two ranks, then copies": ((2, "expert=2"), (4, "replicate=4", "expert=1"), (4, "expert=2")),
    "one rank, then eight": ((1, "expert=1"), (8, "expert=4"), (4, "expert=2")),
}


@pytest.mark.parametrize(
    ("optimizer", "path"),
    [
        ("muon", "two plain ranks"),
        pytest.param("muon", "replicas, then one expert rank each", marks=pytest.mark.slow),
        pytest.param("adamw", "two ranks, then copies", marks=pytest.mark.slow),
        pytest.param("muon", "one rank, then eight", marks=pytest.mark.slow),
    ],
)
def test_the_state_is_bit_equal(optimizer: str, path: str, tmp_path: Path) -> None:
    """From shards of dealt experts, by way of other layouts; only generators of ranks that were new are."""
    run = tmp_path / "run"
    chosen = [part for s in (*SETTINGS, f"optimizer.name={optimizer}") for part in ("--set", s)]
    ended = fullweight("train", "recipes/tiny_smoke.toml", *chosen, "--output", run, ranks=4)
    assert ended.ok, ended.output
    original = verify(newest(run / "checkpoints"))
    assert original.manifest.facts.world == {"ranks": 4, "axes": {"shard": 4, "expert": 2}}
    most = 4
    for ranks, *axes in PATHS[path]:
        most = max(most, ranks)
        settings = ["train.rows_per_step=8", *(f"parallel.{axis}" for axis in axes)]
        call = f"{__name__}:restore_and_write"
        ended = fullweight(run, tmp_path / "again", *settings, ranks=ranks, call=call)
        assert ended.ok, ended.output
        written = choose(tmp_path / "again").generation
        assert written.manifest.facts.world["ranks"] == ranks
        assert written.manifest.facts.position == original.manifest.facts.position
        found = compare(original, written)
        assert [d.name for d in found.tensors] == [f"random.rank_{rank}.cpu" for rank in range(4, most)]
