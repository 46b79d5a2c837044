"""Pieces of tensors come whole to rank 0, however ranks have cut them, and a failure there ends every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.processes import fullweight
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fullweight.checkpoint.gather import WholeTensors, whole_tensors
from fullweight.checkpoint.peers import Peers
from fullweight.core.errors import CheckpointError
from fullweight.parallel.mesh import joined


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def rank_main(arguments: list[str]) -> int:
    """Four ranks as two by two: rows, columns, both, a copy on each, and tensors that one rank alone has."""
    [out] = arguments
    with joined("cpu") as ranks:
        mesh = init_device_mesh("cpu", (2, 2))
        cuts = {
            "rows": (numbered(7, 5), [Replicate(), Shard(0)]),
            "all_rows": (numbered(6, 3), [Shard(0), Shard(0)]),
            "both": (numbered(9, 7, dtype=torch.bfloat16), [Shard(0), Shard(1)]),
            "experts": (numbered(5, 4, 3), [Shard(0), Shard(1)]),
            "columns": (numbered(3, 11), [Shard(1), Replicate()]),
            "few": (numbered(2, dtype=torch.int64), [Shard(0), Replicate()]),
        }
        tensors = {name: distribute_tensor(t, mesh, placements) for name, (t, placements) in cuts.items()}
        tensors["plain"] = numbered(4)
        if ranks.rank >= 2:
            tensors[f"stage_{ranks.rank}"] = numbered(ranks.rank, 2)
        expected = {name: t for name, (t, _) in cuts.items()} | {"plain": numbered(4)}
        expected |= {"stage_2": numbered(2, 2), "stage_3": numbered(3, 2)}
        seen = []

        def take(name: str, tensor: Tensor) -> None:
            assert torch.equal(tensor, expected[name]), name
            seen.append(name)

        whole_tensors(tensors, Peers(), take)
        assert seen == (list(expected) if ranks.is_main else [])
        whole = WholeTensors(tensors, Peers())

        def pieces() -> None:
            assert torch.equal(whole.read("both", ((3, 6), (2, 7))), expected["both"][3:6, 2:7])
            assert torch.equal(whole.read("experts", ((4, 5), (1, 4), (0, 3))), expected["experts"][4:5, 1:4])
            assert torch.equal(whole.read("rows", ((2, 2), (0, 5))), expected["rows"][2:2])

        whole.drive(pieces)

        def fail() -> None:
            whole.read("plain")
            raise CheckpointError("the disk is full")

        try:
            whole.drive(fail)
        except CheckpointError as error:
            told = str(error)
        assert told == ("the disk is full" if ranks.is_main else "rank 0: the disk is full")
        Path(out, str(ranks.rank)).write_text("done")
    return 0


def test_pieces_from_four_ranks(tmp_path: Path) -> None:
    """Every layout that the model's parallel axes make, and stages of a pipeline."""
    ended = fullweight(tmp_path, ranks=4, call=f"{__name__}:rank_main")
    assert ended.ok, ended.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "3"]
