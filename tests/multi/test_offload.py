"""Offload of the optimisers' moments on two ranks: the bits of a run without, saved and resumed either way.

A step under one setting is written, read under the other, and another follows; all that a checkpoint holds is
then compared with two steps without offload and without a break. Buckets are small, so that matrices which FSDP
cuts travel between the ranks in many rounds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.multi.layouts import Case, recipe, take_step
from tests.processes import fullweight
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.generations import choose
from fullweight.core.tensors import local_part
from fullweight.optim import buckets
from fullweight.optim.offload import HostMoments, host_tensors
from fullweight.parallel.mesh import Ranks, joined
from fullweight.train.assemble import Run, assemble
from fullweight.train.run_folder import RunFolder
from fullweight.train.saving import facts

CASE = Case(2, ("data.too_long=truncate", "train.precision=fp32", "optimizer.muon.ns_dtype=float32"), tokens=128)
BUCKET_BYTES = 1 << 14


def made(ranks: Ranks, optimizer: str, offload: bool) -> Run:
    settings = (f"optimizer.name={optimizer}", f"parallel.offload_optimizer={str(offload).lower()}")
    run = assemble(recipe(CASE, *settings), RunFolder(Path("never-written")), ranks)
    assert all(isinstance(o, HostMoments) is offload for o in run.state.optimizers)
    return run


def stepped(run: Run, steps: range) -> Run:
    for step in steps:
        take_step(run, step)
        run.state.step = step + 1
    run.state.loader.close()
    return run


def local_state(run: Run) -> dict[str, Tensor]:
    """This rank's part of all that a checkpoint holds."""
    return {name: local_part(tensor).detach().clone() for name, tensor in run.state.tensors().items()}


def compare_on_ranks(arguments: list[str]) -> int:
    """On every rank: the names that differ, for each way through a checkpoint, into a file."""
    folder, optimizer = Path(arguments[0]), arguments[1]
    buckets.BUCKET_BYTES = BUCKET_BYTES
    found: dict[str, object] = {}
    with joined("cpu") as ranks:
        straight = local_state(stepped(made(ranks, optimizer, False), range(2)))
        for first, second in ((True, False), (False, True)):
            half = stepped(made(ranks, optimizer, first), range(1))
            there = folder / f"{first}-{second}"
            store.save(there, half.state.tensors(), facts(half, None))
            resumed = made(ranks, optimizer, second)
            resumed.state.restore(choose(there).generation)
            stepped(resumed, range(1, 2))
            last = local_state(resumed)
            differ = [n for n in straight if n not in last or not torch.equal(straight[n], last[n])]
            found[f"{first}, then {second}"] = differ + sorted(last.keys() - straight.keys())
            run = half if first else resumed
            moments = {n for n in last if n.startswith("optimizer.") and not n.endswith(".step")}
            found[f"host {first}"] = (len(moments), sum(len(host_tensors(o)) for o in run.state.optimizers))
            found[f"buckets {first}"] = [len(buckets.buckets(o.param_groups)) for o in run.state.optimizers]
        torch.save(found, folder / f"{ranks.rank}.pt")
        ranks.barrier()
    return 0


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_two_ranks_with_offload_are_bit_equal(optimizer: str, tmp_path: Path) -> None:
    """Weights, moments, counters and generators of both ranks; every moment is on the host."""
    call = f"{__name__}:compare_on_ranks"
    ended = fullweight(tmp_path, optimizer, ranks=2, call=call)
    assert ended.ok, ended.output
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (one, other):
        assert found["True, then False"] == found["False, then True"] == []
        for first in (True, False):
            moments, on_host = found[f"host {first}"]
            assert on_host == moments > 0
    assert one["buckets True"] == other["buckets True"]
    assert all(number > 2 for number in one["buckets True"])
