"""Muon on matrices that two mesh axes cut, heads and FSDP, gives what one process gives.

Four ranks as 2 (FSDP) x 2 (heads); rows that do not divide, columns cut by heads, stacks cut inside a matrix and
between two, and parameters that only FSDP cuts, in one optimiser.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.processes import fullweight
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fullweight.optim import muon
from fullweight.optim.clip import clip_grad_norm
from fullweight.optim.muon import Muon, MuonConfig
from fullweight.optim.pieces import pieces_of

NUM_STEPS = 4
# shape, dimension cut by heads, matrices stacked in it
SHAPES: dict[str, tuple[tuple[int, ...], int | None, int]] = {
    "wq_b": ((14, 9), 0, 1),  # heads leave 7 rows each: 4 and 3
    "wq_b_small": ((2, 5), 0, 1),  # one row each, and none for the second FSDP rank
    "wo_a": ((24, 5), 0, 4),  # two groups of six rows on each: whole on one FSDP rank
    "wo_a_odd": ((20, 5), 0, 2),  # one group of ten rows on each: cut by FSDP
    "wo_b": ((7, 12), 1, 1),
    "wo_b_row": ((1, 8), 1, 1),
    "dense": ((11, 6), None, 1),
    "experts": ((3, 4, 6), None, 6),
    "dealt": ((6, 4, 5), 0, 12),  # by both axes, three experts on each rank of the first: two and one
}


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (shape, _, _) in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def build(mesh: DeviceMesh | None) -> tuple[Holder, Muon]:
    """The parameters as FSDP over heads' parts would leave them, and their optimiser."""
    from torch.distributed.tensor.placement_types import _StridedShard

    model = Holder()
    for name, (_, dim, _) in SHAPES.items() if mesh is not None else ():
        parameter = model.get_parameter(name)
        assert mesh is not None
        if dim is None:
            whole = distribute_tensor(parameter.detach(), mesh["cut", "heads"]._flatten(), [Shard(0)])
        else:
            part = distribute_tensor(parameter.detach(), mesh["heads"], [Shard(dim)]).to_local()
            chunks = part.chunk(2, 0)
            place = mesh.get_local_rank("cut")
            local = chunks[place] if place < len(chunks) else part[:0]
            outer = _StridedShard(0, split_factor=2) if dim == 0 else Shard(0)
            whole = DTensor.from_local(
                local.contiguous(), mesh, (outer, Shard(dim)), shape=parameter.shape, stride=parameter.stride()
            )
        model.register_parameter(name, nn.Parameter(whole))
    groups = [
        {"params": [model.get_parameter(n)], "num_matrices": count, "weight_decay": 0.1}
        for n, (_, _, count) in SHAPES.items()
    ]
    return model, Muon(groups, MuonConfig(ns_dtype="float32"), 0.05)


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(SHAPES[name][0], generator=torch.Generator().manual_seed(100 * step + len(name)))


def piece(parameter: Tensor, whole: Tensor) -> Tensor:
    """What of the whole tensor belongs where `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    layout = pieces_of(parameter, 1)
    flat = whole.reshape(-1, whole.shape[-1])
    local = layout.pieces[layout.rank].of(flat).reshape(parameter.to_local().shape)
    return DTensor.from_local(
        local.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def run(mesh: DeviceMesh | None, chunk_entries: int) -> dict[str, object]:
    muon.CHUNK_ENTRIES = chunk_entries
    model, optimizer = build(mesh)
    norms = []
    for step in range(NUM_STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = piece(parameter, gradient(name, step))
        norms.append(clip_grad_norm(model.parameters(), 10.0))
        optimizer.step()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {"weights": {n: w.detach().clone() for n, w in whole.items()}, "norms": norms}


def main(arguments: list[str]) -> int:
    """Body of each rank."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cut", "heads"))
    results = {"one round": run(mesh, 1 << 23), "a matrix at a time": run(mesh, 1)}
    torch.save(results, Path(arguments[0]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's teardown


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pieces")
    ended = fullweight(folder, ranks=4, call="tests.multi.test_muon_pieces:main")
    assert ended.ok, ended.output
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("rounds", ["one round", "a matrix at a time"])
def test_four_ranks_equal_one(ranks: list[dict], rounds: str) -> None:
    """Weights and norms after four steps: the update is that of the whole matrix."""
    expected = run(None, 1 << 23)
    for found in (r[rounds] for r in ranks):
        # fp32 products of other batch sizes, through ten Newton-Schulz steps and four updates
        for name, weight in expected["weights"].items():  # type: ignore[attr-defined]
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=name)
        for a, b in zip(found["norms"], expected["norms"], strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_ranks_agree_bit_for_bit(ranks: list[dict]) -> None:
    for rank in ranks[1:]:
        for rounds, first in ranks[0].items():
            assert all(torch.equal(rank[rounds]["weights"][n], first["weights"][n]) for n in SHAPES)
