"""Operations chosen by name, for all or for one group, and what is said when they are not there."""

from __future__ import annotations

import inspect

import pytest
import torch
from tests.unit.ops import formulas
from tests.unit.ops.checks import check, random
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.ops import OPERATIONS, implementations, resolve_operations
from fullweight.ops.cuda import CudaOperations
from fullweight.ops.late import WeightGradients, put_off
from fullweight.ops.reference import GROUPS, ReferenceOperations, Workload
from fullweight.train.config import OpsSection


class Marked(ReferenceOperations):
    """Has a SwiGLU of its own, which can be told from the others."""

    name = "marked"

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return super().swiglu(gate_up, limit) + 1000.0


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "marked", Marked)


def test_every_operation_is_in_one_group() -> None:
    named = [method for methods in GROUPS.values() for method in methods]
    defined = {name for name, value in vars(ReferenceOperations).items() if inspect.isfunction(value)}
    assert sorted(named) == sorted(
        name for name in defined if name[0] != "_" and name not in ("has_own", "part", "takes")
    )
    assert set(OpsSection.model_fields) == {"default", *GROUPS}


def test_a_group_comes_from_the_set_that_it_names() -> None:
    x = random(3, 8)
    operations = resolve_operations("reference", chosen={"swiglu": "marked"})
    assert operations.name == "reference, swiglu=marked"
    assert torch.equal(operations.swiglu(x, 4.0), ReferenceOperations().swiglu(x, 4.0) + 1000.0)
    assert implementations(operations) == {g: "marked" if g == "swiglu" else "reference" for g in GROUPS}
    # and the other way: all but one
    operations = resolve_operations("marked", chosen={"swiglu": "reference"})
    assert torch.equal(operations.swiglu(x, 4.0), ReferenceOperations().swiglu(x, 4.0))
    assert set(implementations(operations).values()) == {"reference"}


@pytest.mark.parametrize(
    ("name", "device", "chosen", "message"),
    [
        ("referense", "cpu", {}, "did you mean 'reference'"),
        ("ascend", "cpu", {}, "ascend operations do not run on cpu"),
        ("cuda", "cpu", {}, "cuda operations do not run on cpu"),
        ("cpu", "cuda", {}, "cpu operations do not run on cuda"),
        ("reference", "cpu", {"atention": "reference"}, "did you mean 'attention'"),
        ("reference", "cpu", {"attention": "marked"}, "ops.attention: the marked operations have none"),
        ("reference", "npu", {"attention": "cpu"}, "cpu operations do not run on npu"),
    ],
)
def test_what_is_not_there_raises(name: str, device: str, chosen: dict[str, str], message: str) -> None:
    with pytest.raises(OperationError, match=message):
        resolve_operations(name, device, chosen)


def test_auto_leaves_to_the_reference_what_the_set_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Marked, "takes", lambda self, group, workload: workload.head_dim == 512 or group != "swiglu"
    )
    monkeypatch.setattr("fullweight.ops.available_operations", lambda device: ["reference", "marked"])
    small, large = (Workload(torch.bfloat16, 4, width, 8, 16, 4) for width in (16, 512))
    assert resolve_operations("auto", workload=large).name == "marked"
    assert resolve_operations("auto", workload=small).name == "marked, swiglu=reference"
    # what is named is not replaced: it raises when it is used
    assert resolve_operations("marked", workload=small).name == "marked"
    assert resolve_operations("auto", chosen={"swiglu": "marked"}, workload=small).name == "marked, swiglu=marked"


def test_ascend_without_torch_npu_raises() -> None:
    with pytest.raises(OperationError, match="the ascend operations: torch_npu is not installed"):
        resolve_operations("ascend", "npu")


@pytest.mark.parametrize("used", [[0, 1, 2, 3], [3], [1, 4, 2]])
def test_experts_of_cuda_equal_the_formula(used: list[int]) -> None:
    """torch's grouped products run on the CPU too; bf16 on both sides, as `check` bounds it."""
    chosen = torch.tensor([[used[(t + k) % len(used)] for k in range(2)] for t in range(7)])
    inputs = (
        random(7, 16, seed=1, dtype=torch.bfloat16),
        random(7, 2, seed=2).abs() * (chosen < 4),  # number 4 is no expert
        random(4, 16, 16, seed=3, scale=0.3, dtype=torch.bfloat16).float(),
        random(4, 16, 8, seed=4, scale=0.3, dtype=torch.bfloat16).float(),
    )
    operations = CudaOperations()
    check(
        lambda x, w, up, down: operations.experts(x, chosen, w, up, down, 10.0),
        lambda x, w, *matrices: formulas.experts(
            x, chosen, w, *(torch.cat((m, 0 * m[:1])) for m in matrices), 10.0
        ),
        inputs,
        torch.bfloat16,
    )


def test_experts_of_cuda_leave_weight_gradients_for_later() -> None:
    chosen = torch.tensor([[0, 2], [1, 2], [2, 0]])
    x = random(3, 16, seed=1, dtype=torch.bfloat16).requires_grad_()
    weights = [random(3, 16, 16, seed=3).requires_grad_(), random(3, 16, 8, seed=4).requires_grad_()]
    scale, queue = random(3, 2, seed=2), WeightGradients()
    with put_off(queue):
        CudaOperations().experts(x, chosen, scale, *weights, 2.0).sum().backward()
    assert all(w.grad is None for w in weights)
    queue.take()()
    later = [w.grad for w in weights]
    now = torch.autograd.grad(CudaOperations().experts(x, chosen, scale, *weights, 2.0).sum(), weights)
    for a, b in zip(now, later, strict=True):
        assert b is not None
        assert torch.equal(a, b)


def test_experts_of_cuda_refuse_another_type() -> None:
    with pytest.raises(OperationError, match=r'found float32; set ops.experts = "reference"'):
        CudaOperations().experts(
            random(3, 16),
            torch.zeros(3, 1, dtype=torch.int64),
            random(3, 1),
            random(1, 16, 16),
            random(1, 16, 8),
            2.0,
        )
