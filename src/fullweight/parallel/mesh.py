"""The ranks of a run: who this process is, and the few agreements that ranks must reach.

One object serves a plain process and `torchrun` alike: alone, every agreement is the identity and no process
group exists, so the same loop runs in both. Reductions are of small host-side vectors (counts, flags); model
gradients are reduced by FSDP (`fsdp.py`).

`Ranks.laid_out` gives the ranks their places (`config.Layout`) and builds the device meshes and process groups
that sharding needs. Ranks that share a row (context, tensor, pipeline) each report what they alone hold, so that a
plain sum over all ranks is right for losses and counts of experts; what they all know about the row (tokens,
normalisers, lengths) is reported by the one rank whose `counts_row` is true.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fullweight.core.errors import ToldError
from fullweight.devices import DeviceName, find
from fullweight.parallel.agreement import agree, standing
from fullweight.parallel.config import Layout
from fullweight.parallel.launch import LaunchConfig
from fullweight.parallel.rendezvous import meet
from fullweight.parallel.watch import Watch

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Meshes:
    """Device meshes of this rank's stage. Those of axes that the layout does not use are None.

    `dense`, `heads` and `experts` are what FSDP cuts parameters over: one axis, or two with the replicas in front.
    `tensor` and `expert` are the axes that cut a parameter before FSDP does; a mesh of either pair can be joined.
    """

    dense: DeviceMesh  # shard x context x tensor: parameters that every rank of a stage uses whole
    tensor: DeviceMesh | None = None
    heads: DeviceMesh | None = None  # shard x context: parameters cut by tensor
    expert: DeviceMesh | None = None
    experts: DeviceMesh | None = None  # the ranks with the same experts
    slices: DeviceMesh | None = None  # context x tensor: ranks that share a row
    context: DeviceMesh | None = None
    pipeline: DeviceMesh | None = None

    @staticmethod
    def build(layout: Layout, device: str) -> Meshes:
        """All ranks together, in the same order; creates process groups. Not under fake tensors."""
        front = {"pipeline": layout.pipeline, "replicate": layout.replicate}
        sharding = ("replicate", "cut") if layout.replicate > 1 else ("cut",)

        def view(**sizes: int) -> DeviceMesh:
            names = {**front, **sizes}
            return init_device_mesh(device, tuple(names.values()), mesh_dim_names=tuple(names))

        whole = view(cut=layout.dense)
        meshes = Meshes(dense=whole[sharding], pipeline=whole["pipeline"] if layout.pipeline > 1 else None)
        if layout.tensor > 1:
            heads = view(cut=layout.shard * layout.context, tensor=layout.tensor)
            meshes = replace(meshes, tensor=heads["tensor"], heads=heads[sharding])
            heads["cut", "tensor"]._flatten()  # the group in which Muon's pieces travel
        if layout.expert > 1:
            experts = view(cut=layout.expert_shard, expert=layout.expert)
            meshes = replace(meshes, expert=experts["expert"], experts=experts[sharding])
        if layout.num_slices > 1:
            rows = view(shard=layout.shard, slices=layout.num_slices)
            meshes = replace(meshes, slices=rows["slices"])
        if layout.context > 1:
            cuts = view(shard=layout.shard, context=layout.context, tensor=layout.tensor)
            meshes = replace(meshes, context=cuts["context"])
        return meshes


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; `meshes` is None when it runs alone, or before `laid_out`."""

    rank: int
    size: int
    device: torch.device
    layout: Layout = field(default_factory=Layout)
    meshes: Meshes | None = None
    watch: Watch | None = None  # over the peers; None when alone

    def laid_out(self, layout: Layout) -> Self:
        """The same ranks in their places; builds the meshes, all ranks together."""
        assert layout.world == self.size, f"{layout} on {self.size} ranks"
        return replace(
            self, layout=layout, meshes=Meshes.build(layout, self.device.type) if self.size > 1 else None
        )

    @property
    def data_rank(self) -> int:
        """Which rows are this rank's, of `data_size` shares."""
        return self.layout.data_rank(self.rank)

    @property
    def data_size(self) -> int:
        return self.layout.data_size

    @property
    def stages(self) -> dist.ProcessGroup | None:
        """The ranks with the other stages of this rank's pipeline; None without one."""
        pipeline = None if self.meshes is None else self.meshes.pipeline
        return None if pipeline is None else pipeline.get_group()

    @property
    def counts_row(self) -> bool:
        """Whether this rank reports what all ranks of its row know; the others report zeros."""
        return self.layout.counts_row(self.rank)

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes the run folder."""
        return self.rank == 0

    def reduce(self, values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
        """All ranks' `values` (any shape, any device) combined element by element; a new tensor."""
        result = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(result, _OPERATIONS[operation])
        return result

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: every rank gets the same answer."""
        return bool(self.reduce(torch.tensor(float(flag)), "max").item()) if self.size > 1 else flag

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (picklable) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable) in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise TrainingError, naming ranks and values, unless every rank holds the same facts."""
        agree(facts, self.rank, self.size)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A failure of the block is told once among all ranks (`watch.py`), while signals still wait."""
        if self.watch is None:
            yield
            return
        with self.watch.telling():
            yield

    @contextmanager
    def main_first_failure(self) -> Iterator[None]:
        """Run a block that only rank 0 does real work in; its failure stops every rank, not rank 0 alone."""
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        message = self.broadcast(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if message is not None:
            raise ToldError(f"stopped because rank 0 failed: {message}")


@contextmanager
def joined(
    device_name: DeviceName = "auto",
    launch: LaunchConfig = LaunchConfig(),  # noqa: B008 - immutable
    facts: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Join the ranks that torchrun started (its environment variables say so), or run alone.

    The ranks meet, prove that they run the same code and `facts`, and watch each other from then on: a failure
    inside is told once. The process group is torn down on leaving. Collectives work on host tensors (gloo) on
    every machine, and on device tensors through the device's own backend. Raises TrainingError, and ConfigError
    when the device asked for is absent.
    """
    kind = find(device_name)
    device = kind.device(int(os.environ.get("LOCAL_RANK", "0")))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    meeting = meet(launch, size)
    watch = Watch(meeting, launch)
    with watch.running():
        dist.init_process_group(
            kind.backend(),
            store=meeting.store,
            rank=meeting.rank,
            world_size=size,
            timeout=timedelta(seconds=launch.collective_timeout_seconds),
        )
        try:
            with watch.telling():
                agree({**standing(size), **(facts or {})}, meeting.rank, size)
                yield Ranks(meeting.rank, size, device, watch=watch)
                dist.barrier()  # no rank takes its end of a connection away while another still sends
        finally:
            dist.destroy_process_group()
