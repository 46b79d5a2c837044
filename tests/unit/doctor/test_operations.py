"""The self-test covers every operation, passes on sets that are right, and names one that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullweight.core.errors import OperationError
from fullweight.core.types import PackedLayout
from fullweight.doctor.operations import LENGTHS, NUM_TOKENS, RATIO, cases, try_operations
from fullweight.ops import available_operations, resolve_operations
from fullweight.ops.reference import GROUPS, ReferenceOperations


def test_every_operation_has_a_case() -> None:
    methods = {method for group in GROUPS.values() for method in group}
    layout = PackedLayout.build(LENGTHS, (RATIO,), NUM_TOKENS)
    assert {case.operation.split()[0] for case in cases(layout)} == methods


@pytest.mark.parametrize("name", available_operations())
def test_sets_that_are_right_pass(name: str) -> None:
    results = try_operations(resolve_operations(name), torch.device("cpu"))
    bad = [r for r in results if r.failure or max(r.error or 0.0, r.gradient_error or 0.0) > r.tolerance]
    assert bad == []
    assert all(r.gradient_error is not None for r in results if r.operation != "select_entries")


class Wrong(ReferenceOperations):
    """One wrong value, one wrong gradient, one missing kernel, one NaN."""

    name = "wrong"

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        return super().swiglu(gate_up, limit) * 1.01

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y = super().rms_norm(x, weight, eps)
        return y.detach() + 0.5 * (y - y.detach())

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for rotary")

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().linear(x, weight) * float("nan")


class Narrow(ReferenceOperations):
    """Takes one type for one operation, and none for another."""

    name = "narrow"

    def swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        if gate_up.dtype == torch.float32:
            raise OperationError("swiglu takes bfloat16")
        return super().swiglu(gate_up, limit)

    def hyper_mix(self, streams: Tensor, pre: Tensor) -> Tensor:
        raise OperationError("hyper_mix takes 5 streams")


def test_a_type_that_a_set_does_not_take_is_no_fault() -> None:
    """Unless it takes none, and then the reason is told; the rest is tried."""
    results = try_operations(Narrow(), torch.device("cpu"))
    assert [(r.dtype, r.failure) for r in results if r.operation == "swiglu"] == [("bf16", None)]
    mixed = [r.failure for r in results if r.operation == "hyper_mix"]
    assert mixed == ["hyper_mix takes 5 streams"] * 2
    assert len({r.operation for r in results}) > 10


def test_a_wrong_set_is_named() -> None:
    results = {(r.operation, r.dtype): r for r in try_operations(Wrong(), torch.device("cpu"))}
    assert (results["swiglu", "fp32"].error or 0) > results["swiglu", "fp32"].tolerance
    assert (results["rms_norm", "fp32"].error or 0) < results["rms_norm", "fp32"].tolerance
    assert (results["rms_norm", "fp32"].gradient_error or 0) > results["rms_norm", "fp32"].tolerance
    assert results["rotary", "bf16"].failure == "no kernel for rotary"
    assert results["linear", "fp32"].failure == "values that are not finite, or of another shape"
    assert results["hyper_mix", "fp32"].failure is None
