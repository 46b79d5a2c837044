"""The token axis over ranks: context and tensor parallelism as one cut of the packed row.

The ranks that share a row (context x tensor of them, tensor fastest) hold one slice of its tokens each, and run
everything token-wise on it alone. Attention is what reaches across:

- the compressor gets the last rows before its slice from the rank before, makes the entries whose windows end
  in the slice, and all entries are gathered by all (report section 5.2);
- the `tensor` ranks of one context rank trade tokens for heads: each gets the queries' latents and keys of all
  their slices together (a span), attends for its own heads, and the partial outputs are summed back to slices;
- a span's window reaches into the last rows of the span before, which come from the context rank before.

So every rank computes its own part of every sum, and the gradient of a parameter that all hold is the plain sum
over ranks. Left out: overlap of the exchanges with computation; windows longer than a slice (refused by the
configuration).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fullweight.core.slicing import WHOLE, Slice
from fullweight.core.tensors import local_part
from fullweight.models.deepseek_v4.tokens import TokenAxis
from fullweight.parallel.collectives import gather_rows, heads_to_rows, rows_before, scatter_sum, sum_over


class SlicedTokens(TokenAxis):
    """One rank's slice of the rows that the ranks of `slices` share.

    slices: the context x tensor ranks of one row, tensor fastest; context: those of them with this rank's
    tensor index; tensor: those with this rank's context index. An axis of one rank needs no group.
    """

    def __init__(
        self, slices: ProcessGroup, context: ProcessGroup | None = None, tensor: ProcessGroup | None = None
    ) -> None:
        self.slices, self.context, self.tensor = slices, context, tensor
        self.slice, self.span, part = _place(slices), _place(context), _place(tensor)
        self.num_tensor = part.count
        expected = Slice(self.span.index * part.count + part.index, self.span.count * part.count)
        assert self.slice == expected, "tensor ranks are consecutive slices"

    def before(self, rows: int, *parts: Tensor) -> tuple[Tensor, ...]:
        if not rows:
            return parts
        # one exchange for all
        tails = torch.cat([p[p.shape[0] - rows :] for p in parts], -1)
        fronts = rows_before(tails, rows, self.slices).split([p.shape[-1] for p in parts], -1)
        return tuple(torch.cat(pair) for pair in zip(fronts, parts, strict=True))

    def entries(self, made: Tensor, order: Tensor | None) -> Tensor:
        assert order is not None, "a slice's table says where the row's entries lie"
        return gather_rows(made, self.slices).index_select(0, order)

    def widen(self, rows: Tensor) -> Tensor:
        if self.tensor is None:
            return rows
        if rows.dtype == torch.int64:  # indices of entries: half the bytes
            return gather_rows(rows.to(torch.int32), self.tensor).to(torch.int64)
        return gather_rows(rows, self.tensor)

    def before_span(self, rows: int, span: Tensor) -> Tensor:
        if self.context is None or not rows:
            return span
        return torch.cat((rows_before(span, rows, self.context), span))

    def narrow(self, partial: Tensor) -> Tensor:
        return partial if self.tensor is None else scatter_sum(partial, self.tensor)

    def all_heads(self, mine: Tensor) -> Tensor:
        return mine if self.tensor is None else heads_to_rows(mine, self.tensor)

    def own_heads(self, values: Tensor) -> Tensor:
        return values if self.tensor is None else values.chunk(self.num_tensor)[dist.get_rank(self.tensor)]

    def own(self, weight: Tensor) -> Tensor:
        return local_part(weight)

    def whole(self, rows: Tensor) -> Tensor:
        return gather_rows(rows.detach(), self.slices)

    def sum(self, values: Tensor) -> Tensor:
        return sum_over(values, self.slices)


def _place(group: ProcessGroup | None) -> Slice:
    return WHOLE if group is None else Slice(dist.get_rank(group), dist.get_world_size(group))
