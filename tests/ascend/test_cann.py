"""torch_npu on the stand-in for CANN: it imports, knows its operators, and they run on tensors without data."""

from __future__ import annotations

import math

import pytest
import torch
from tests.ascend.cann import CHIP, DIES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="npu:0")


def test_the_stand_in_answers() -> None:
    assert torch.npu.get_device_name(0) == CHIP
    assert torch.npu.device_count() == DIES


def test_operators_device_type_and_backend_are_registered() -> None:
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("npu::")}
    assert len(names) >= 400
    assert torch.distributed.is_backend_available("hccl")
    assert torch.device("npu", 3).type == "npu"
    assert torch._C._get_privateuse1_backend_name() == "npu"


def test_a_misspelt_argument_is_refused() -> None:
    """What these tests rest on: a call that does not fit the schema raises, with or without data."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="epsilom"):
        torch.ops.npu.npu_rms_norm(_empty(4, 8), _empty(8), epsilom=1e-6)


def test_operators_run_without_data() -> None:
    with FakeTensorMode():
        x = _empty(6, 32)
        assert (x @ _empty(32, 16)).shape == (6, 16)
        normed, scale = torch.ops.npu.npu_rms_norm(x, _empty(32))
        assert (normed.shape, normed.dtype, scale.shape) == (x.shape, x.dtype, (6, 1))
        assert torch.ops.npu.npu_swiglu(x).shape == (6, 16)
        products = torch.ops.npu.npu_grouped_matmul(
            [x],
            [_empty(3, 32, 16)],
            group_list=_empty(3, dtype=torch.int64),
            split_item=3,
            group_type=0,
            group_list_type=1,
        )
        assert [p.shape for p in products] == [(6, 16)]
        q, kv = _empty(1, 6, 4, 64), _empty(1, 6, 1, 64)
        out = torch.ops.npu.npu_fusion_attention(q, kv, kv, 4, "BSND", scale=1 / math.sqrt(64))[0]
        assert (out.shape, out.device.type) == (q.shape, "npu")
