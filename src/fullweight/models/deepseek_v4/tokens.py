"""Where attention reaches beyond the tokens at hand: the one seam between the model and a row cut into slices.

The model is mathematics on a row of tokens. When a row is shared, each holder runs the model on its own slice,
and the layers ask the token axis for what lies outside: rows before the slice, the other slices' compressed
entries, and, where heads are shared out too, the tokens of a wider span for fewer heads. `TokenAxis` is the
row that is whole: every answer is its argument. `parallel/context.py` has the answers for ranks.

Spans: a *slice* is what this holder runs token-wise; the *span* is the run of slices whose queries it attends
for, with its share of the heads. Alone, both are the row.
"""

from __future__ import annotations

from torch import Tensor

from fullweight.core.slicing import WHOLE, Slice


class TokenAxis:
    """The whole row, all heads."""

    slice: Slice = WHOLE  # of the row: the tokens that everything but attention runs on
    span: Slice = WHOLE  # of the row: the queries that attention runs on

    def before(self, rows: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each of `parts` [s, w], which are of one dtype, behind the last `rows` rows of the slice before.

        The first slice gets zeros. A row that is whole has nothing before it: [s, w] come back.
        """
        return parts

    def entries(self, made: Tensor, order: Tensor | None) -> Tensor:
        """The row's entries [E, c] from the slice's own `made` [P, c]; `order` is the table's."""
        return made

    def widen(self, rows: Tensor) -> Tensor:
        """The span's rows [S, ...] from the slice's [s, ...]."""
        return rows

    def before_span(self, rows: int, span: Tensor) -> Tensor:
        """`span` [S, c] behind the last `rows` rows of the span before; as `before`."""
        return span

    def narrow(self, partial: Tensor) -> Tensor:
        """The slice's rows [s, ...] of the sum over heads, from this holder's heads' part [S, ...]."""
        return partial

    def all_heads(self, mine: Tensor) -> Tensor:
        """The slice's rows for all heads [s, H, ...], from the span's for local heads [S, h, ...]; no gradient."""
        return mine

    def own_heads(self, values: Tensor) -> Tensor:
        """The local heads' part of a replicated parameter [H]."""
        return values

    def own(self, weight: Tensor) -> Tensor:
        """This holder's part, a plain tensor, of a weight that is cut by heads."""
        return weight

    def whole(self, rows: Tensor) -> Tensor:
        """The row's [T, ...] from the slice's own `rows` [s, ...]; no gradient."""
        return rows

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the slices of the row; no gradient."""
        return values


WHOLE_ROW = TokenAxis()
