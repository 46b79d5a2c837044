"""FLOPs of the products that torch's own table of formulas does not know, for rehearsals on an NPU.

On other devices torch takes `matmul` apart before anything counts it; torch_npu keeps it whole. Sparse attention
is counted by the places of its lists, of which some may be empty: an upper bound. A product and its addition are
two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


@functools.cache
def register_flops() -> None:
    """Add the formulas to torch's table, once."""
    aten, npu = torch.ops.aten, torch.ops.npu
    formulas: dict[Any, Any] = {aten.matmul: _product, aten.matmul_backward: _product_backward}
    for name, formula in _OF_NPU.items():
        formulas[getattr(npu, name)] = formula
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


def _product(left: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * left[-1]


def _product_backward(grad: Shape, left: Shape, *_: Any, out_shape: Sequence[Shape | None], **__: Any) -> int:
    wanted = sum(shape is not None for shape in out_shape)
    return wanted * 2 * math.prod(grad) * left[-1]


def _grouped(rows: Sequence[Shape], weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows[0]) * weights[0][-1]


def _grouped_outer(_total: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _attention(products: int, q: Shape, _keys: Shape, _values: Shape, index: Shape, *_: Any, **__: Any) -> int:
    return products * 2 * math.prod(q) * index[-1]


def _indexer(queries: Shape, keys: Shape, *_: Any, actual_seq_lengths_query: Shape, **__: Any) -> int:
    """Runs of queries are taken for equally long, and for seeing all keys of theirs."""
    return 2 * math.prod(queries) * keys[0] // actual_seq_lengths_query[0]


_OF_NPU = {
    "npu_lightning_indexer": _indexer,
    "npu_grouped_matmul": _grouped,
    "npu_grouped_matmul_add_": _grouped_outer,
    "npu_sparse_flash_attention": functools.partial(_attention, 2),
    "npu_sparse_flash_attention_grad": functools.partial(_attention, 5),
}
