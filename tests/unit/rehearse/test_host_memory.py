"""Moments in host memory are no part of what a rehearsal counts; the buckets that visit the device are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fullweight.core.role import ParameterRole
from fullweight.optim import buckets
from fullweight.optim.groups import OptimizerConfig, build_optimizers
from fullweight.optim.offload import host_tensors
from fullweight.rehearse.memory import Category
from fullweight.rehearse.tracer import Tracer

ROWS, COLUMNS, COUNT = 8, 16, 5
PARAMETER_BYTES = 4 * ROWS * COLUMNS


@pytest.mark.parametrize("offload", [False, True])
def test_moments_on_the_host_are_left_out(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five parameters, each a bucket: AdamW's moments are ten tensors without offload, of two buckets with it."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", PARAMETER_BYTES)
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(ROWS, COLUMNS)) for i in range(COUNT)})
    roles = {f"p{i}": ParameterRole("adamw") for i in range(COUNT)}
    config = OptimizerConfig(name="adamw", learning_rate=0.1)
    (optimizer,) = build_optimizers(model, roles, config, offload=offload)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with (tracer := Tracer()):
        tracer.leave_out(host_tensors(optimizer))
        states = [value for state in optimizer.state.values() for value in state.values()]
        tracer.mark([s for s in states if s.dim() > 0], Category.optimizer)
        optimizer.step()
    most = tracer.timeline().most()
    assert most["optimizer"] == (0 if offload else 2 * COUNT * PARAMETER_BYTES)
    assert (most["temporaries"] >= 2 * 2 * PARAMETER_BYTES) is offload
    assert most["temporaries"] < 3 * 2 * PARAMETER_BYTES


def test_sharded_moments_on_the_host_are_left_out_too() -> None:
    """A rank's part of a sharded moment: nothing of it is written down, as it was made before."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(DTensor.from_local(torch.ones(ROWS, COLUMNS), mesh, [Shard(0)]))
        config = OptimizerConfig(name="adamw", learning_rate=0.1)
        roles = {"p": ParameterRole("adamw")}
        (optimizer,) = build_optimizers(nn.ParameterDict({"p": parameter}), roles, config, offload=True)
        parameter.grad = DTensor.from_local(torch.ones(ROWS, COLUMNS), mesh, [Shard(0)])
        optimizer.step()
        with (tracer := Tracer()):
            tracer.leave_out(host_tensors(optimizer))
            torch.ones(3)
        assert [block.num_bytes for block in tracer.blocks] == [12]
    finally:
        dist.destroy_process_group()
