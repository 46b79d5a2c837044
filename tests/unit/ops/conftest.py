"""Every contract test runs on each set of operations that this machine has; some on those of CUDA too.

The latter are torch's own products and formulas, which run on a CPU as well (`tests/device` runs them where they
belong). Of theirs, what is the reference's anyway is not tested twice, and the experts, which take bf16 and widths
of 8 alone, have tests of their own (`test_groups.py`).
"""

from __future__ import annotations

import pytest

from fullweight.ops import available_operations, resolve_operations
from fullweight.ops.cuda import CudaOperations
from fullweight.ops.groups import ComposedOperations
from fullweight.ops.reference import ReferenceOperations

CUDA = {
    "test_rms_norm",
    "test_rotary",
    "test_norm_rotary",
    "test_swiglu",
    "test_hyper_pre",
    "test_hyper_post",
    "test_hyper_head",
    "test_attention",
    "test_attention_of_slices",
    "test_attention_of_extreme_logits",
    "test_rows_too_short_for_any_entry",
    "test_indexer_loss",
    "test_indexer_loss_by_hand",
    "test_inputs_need_not_be_contiguous",
    "test_gradients_are_the_same_bits",
    "test_a_norm_holds_nothing_that_can_be_made_again",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ops" in metafunc.fixturenames:
        names = [*available_operations(), *(["cuda"] if metafunc.function.__name__ in CUDA else [])]
        metafunc.parametrize("ops", names, indirect=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> ReferenceOperations:
    if request.param == "cuda":
        return ComposedOperations(CudaOperations(), {"experts": ReferenceOperations()})
    return resolve_operations(request.param)
