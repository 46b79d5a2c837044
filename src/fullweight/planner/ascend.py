"""What the operations of an Ascend die make, keep and take, in bytes: `ops/ascend`, and `ops/reference.py` where
it has no operator.

As `operations.py` for a CPU's: the same names, and the same order of births and deaths as a rehearsal with
`--device npu --ops ascend` shows.
Most of the difference: hyper-connections are plain torch, whose autograd keeps the streams in fp32, twice for each
sublayer's input and once for its output; attention keeps its output before and after it is rotated back, and its
gradient has it in fp32; a chunk of the head's logits is there in fp32 three times.

Left out: what does not grow with heads or width (tables of a rotation, signs), and what the operators take for
themselves. Hyper-connections by torch_npu, which a recipe may ask for, are not here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fullweight.planner.graph import Value
from fullweight.planner.operations import BF16, FP32, INT32, INT64, Back, Operations, up
from fullweight.planner.tape import Block

_QUERIES, _LOGITS = 256, 1024  # QUERY_CHUNK and TOKEN_CHUNK of ops/reference.py
_PLACES, _ROTARY = 1024, 64  # STEP and ROTARY_DIM of ops/ascend/attention.py


class AscendOperations(Operations):
    """The operations of one pass on an Ascend die, its hyper-connections in torch."""

    # ---- element-wise -------------------------------------------------------------------------------

    def norm(
        self,
        name: str | None,
        x: Value,
        rows: int,
        width: int,
        size: int = BF16,
        keep: bool = True,
        turned: int = 0,
    ) -> Value:
        """A rotation is an operation of its own."""
        if not turned:
            return super().norm(name, x, rows, width, size, keep)
        normed = super().norm(name, x, rows, width, size, keep=False)
        value = self.rotary(normed, rows, width, turned, size)
        if keep:

            def again(_: Block) -> Block:
                normed, factors = self.new(rows * width * size), self.new(rows * FP32)
                made = self._rotated(rows, width, turned, size)
                del normed, factors
                return made

            self.graph.keep(value, again, x)
        return value

    def rotary(self, x: Value, rows: int, width: int, turned: int, size: int = BF16) -> Value:
        back = lambda g, s: (self._rotated(rows, width, turned, size),)  # noqa: E731
        return self.graph.node(back, [x], [self._rotated(rows, width, turned, size)])[0]

    def _rotated(self, rows: int, width: int, turned: int, size: int) -> Block:
        """The last channels in fp32, turned and put behind the others."""
        part = self.new(rows * turned * FP32 if size < FP32 else 0)
        other = self.new(rows * turned * FP32)
        narrow = self.new(rows * turned * size if size < FP32 else 0)
        out = self.new(rows * width * size)
        del part, other, narrow
        return out

    def swiglu(self, hidden: Value, rows: int, f: int) -> Value:
        back = lambda g, s: (self._swiglu_back(rows, f),)  # noqa: E731
        value = self.graph.node(back, [hidden], [self.new(rows * f * BF16)], [hidden])[0]
        return self.graph.keep(value, lambda _: self.new(rows * f * BF16), hidden)

    def _swiglu_back(self, rows: int, f: int) -> Block:
        """The gradient at the clamped input, 0 where it clamps."""
        halves = self.new(rows * f * BF16), self.new(rows * f * BF16)
        clamped = self.new(rows * 2 * f * BF16)
        del halves
        inner, differs = self.new(rows * 2 * f * BF16), self.new(rows * 2 * f)
        made = self.new(rows * 2 * f * BF16)
        del clamped, inner, differs
        return made

    def _wide(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * BF16),), [x], [self.new(numbers * FP32)])[0]

    def _narrow(self, x: Value, numbers: int) -> Value:
        return self.graph.node(lambda g, s: (self.new(numbers * FP32),), [x], [self.new(numbers * BF16)])[0]

    # ---- hyper-connections --------------------------------------------------------------------------

    def hyper_pre(
        self, name: str, streams: Value, tokens: int, n: int, d: int, rounds: int
    ) -> tuple[Value, Value, Value]:
        maps, square = (2 + n) * n, tokens * n * n * FP32
        logits = self._hyper_logits(f"{name}_fn", streams, tokens, n * d, maps)
        made = [self.new(tokens * n * FP32), self.new(tokens * n * FP32), self.new(square)]
        shares = self.new(2 * tokens * n * FP32)
        # Sinkhorn's sums and quotients but the last, which is the result
        every = self.new((2 * rounds - 1) * (square + tokens * n * FP32) + square)
        weights = self.graph.node(
            lambda g, s: (self.new(tokens * maps * FP32),), [logits], made, [shares, every, made[2]]
        )
        del logits, shares, every, made
        x = self._mixed(streams, weights[0], tokens, n, d)

        def again(*_: Block) -> Block:
            wide, mixed = self.new(tokens * n * d * FP32), self.new(tokens * d * FP32)
            del wide
            out = self.new(tokens * d * BF16)
            del mixed
            return out

        self.graph.keep(x, again, streams, Value(weights[0].block))
        return x, weights[1], weights[2]

    def _hyper_logits(self, name: str, streams: Value, tokens: int, width: int, maps: int) -> Value:
        """The maps' logits: a product in fp32, over the root of the streams' mean square."""
        numbers = tokens * width
        flat = self._wide(streams, numbers)

        def back_product(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given, weight = self.new(numbers * FP32), self.new(maps * width * FP32)
            self.weigh(name, self.new(maps * width * FP32))  # a copy that lies as the weight does
            del weight
            return (given,)

        def back_square(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            power, twice = self.new(numbers * FP32), self.new(numbers * FP32)
            made = self.new(numbers * FP32)
            del power, twice
            return (made,)

        product = self.graph.node(back_product, [flat], [self.new(tokens * maps * FP32)], [flat])[0]
        square = self.graph.node(back_square, [flat], [self.new(numbers * FP32)], [flat])[0]
        root = self.new(tokens * FP32)
        inverse = self.graph.node(lambda g, s: (self.new(numbers * FP32),), [square], [root], [root])[0]
        del square
        scaled = lambda g, s: (self.new(tokens * maps * FP32), self.new(tokens * FP32))  # noqa: E731
        out = self.new(tokens * maps * FP32)
        return self.graph.node(scaled, [product, inverse], [out], [product, inverse])[0]

    def _mixed(self, streams: Value, pre: Value, tokens: int, n: int, d: int) -> Value:
        """The streams' weighted sum."""
        wide = self._wide(streams, tokens * n * d)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            return self.new(tokens * n * d * FP32), self.new(tokens * n * FP32)

        mixed = self.graph.node(backward, [wide, pre], [self.new(tokens * d * FP32)], [wide, pre])[0]
        return self._narrow(mixed, tokens * d)

    def hyper_post(self, streams: Value, y: Value, post: Value, comb: Value, tokens: int, n: int, d: int) -> Value:
        numbers = tokens * n * d
        wide = self._wide(streams, numbers)

        def back_mix(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            return self.new(tokens * n * n * FP32), self.new(numbers * FP32)

        def back_product(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            of_y, of_post = self.new(numbers * FP32), self.new(numbers * FP32)
            dpost = self.new(tokens * n * FP32)
            del of_post
            dy = self.new(tokens * d * FP32)
            del of_y
            return dpost, dy

        mixed = self.graph.node(back_mix, [comb, wide], [self.new(numbers * FP32)], [comb, wide])[0]
        wide_y = self._wide(y, tokens * d)
        product = self.graph.node(back_product, [post, wide_y], [self.new(numbers * FP32)], [post, wide_y])[0]
        total = self.graph.node(lambda g, s: (g[0], g[0]), [mixed, product], [self.new(numbers * FP32)])[0]
        del product
        return self._narrow(total, numbers)

    def again_post(self, tokens: int, n: int, d: int) -> Callable[..., Block]:
        def again(*_: Block) -> Block:
            numbers = tokens * n * d
            wide, mixed = self.new(numbers * FP32), self.new(numbers * FP32)
            del wide
            wide_y, product = self.new(tokens * d * FP32), self.new(numbers * FP32)
            del wide_y
            total = self.new(numbers * FP32)
            del product
            out = self.new(numbers * BF16)
            del total, mixed
            return out

        return again

    def hyper_head(self, name: str, streams: Value, tokens: int, n: int, d: int) -> Value:
        logits = self._hyper_logits(f"{name}_fn", streams, tokens, n * d, n)
        share = self.new(tokens * n * FP32)
        back = lambda g, s: (self.new(tokens * n * FP32),)  # noqa: E731
        pre = self.graph.node(back, [logits], [self.new(tokens * n * FP32)], [share])[0]
        return self._mixed(streams, pre, tokens, n, d)

    # ---- attention ----------------------------------------------------------------------------------

    def compress(
        self, name: str, values: Value, gates: Value, rows: int, entries: int, width: int, c: int, ratio: int
    ) -> Value:
        """Windows gathered by index; values and shares are kept."""
        cells = entries * ratio * width * FP32
        value, picked = self.new(cells), self.new(cells)
        gate = self.new(cells)
        del picked
        if width > c:  # halves of the window before and of this one
            picked = self.new(cells)
            before = self.new(cells // 2), self.new(cells // 2)
            del picked
            picked = self.new(cells)
            earlier = self.new(cells // 2)
            del picked
            value = self.new(cells)
            del earlier
            gate = self.new(cells)
            del before
        share, product = self.new(cells), self.new(cells)
        out = self.new(entries * c * FP32)
        del gate, product

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dvalue, dshare = self.new(cells), self.new(cells)
            dgate = self.new(cells)
            del dshare
            parts = [self.new(cells) for _ in range(2 if width > c else 0)]
            size = rows * width * FP32
            zeros, dvalues = self.new(size), self.new(size)
            dgates = self.new(size)
            del zeros, parts, dvalue, dgate
            self.weigh(f"{name}.ape", self.new(ratio * width * FP32))
            return dvalues, dgates

        return self.graph.node(backward, [values, gates], [out], [value, share])[0]

    def attention(
        self,
        q: Value,
        keys: Value,
        entries: Value | None,
        selected: Value | None,
        *,
        tokens: int,
        front: int,
        heads: int,
        c: int,
        window: int,
        num_entries: int,
        topk: int,
        turned: int,
    ) -> tuple[Value, Value]:
        """One call over lists of the keys that each query sees; tokens' keys and entries stand in one tensor."""
        queries, statistic = tokens * heads * c * BF16, tokens * heads * FP32
        total = front + tokens + num_entries
        if entries is not None:
            keys = self.graph.node(lambda g, s: (g[0], g[0]), [keys, entries], [self.new(total * c * BF16)])[0]
        most = topk if selected is not None else num_entries
        places, chosen = up(window + most, _PLACES), selected is not None

        def around() -> tuple[Block, ...]:
            index = self._list(tokens, places, most, chosen=chosen)
            return index, self.new(tokens * heads * _ROTARY * BF16), self.new(total * _ROTARY * BF16)

        given = around()
        raw, largest, denominator = self.new(queries), self.new(statistic), self.new(statistic)
        del given
        highest, part = self.new(statistic), self.new(statistic)
        summed = self.new(statistic)
        del largest, denominator
        wide = self.new(2 * queries)
        out = self.new(queries)
        del wide, raw, part
        logarithm = self.new(statistic)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given = around()
            dq, parts = self.new(queries), (self.new(total * c * BF16), self.new(total * c * BF16))
            extra = self.new(tokens * heads * _ROTARY * BF16)
            del given, extra
            share = self.new(statistic), self.new(statistic)
            wide = self.new(2 * queries), self.new(2 * queries)
            product = self.new(2 * queries)
            del wide
            summed = self.new(statistic)
            del product, summed, share
            dkeys = self.new(total * c * BF16)
            del parts
            return dq, dkeys

        kept: list[Value | Block | None] = [q, keys, out, highest, summed, selected]
        found = self.graph.node(backward, [q, keys], [out], kept)[0]
        mass = self._mass(tokens, heads, topk, c) if selected is not None else self.new(0)
        del logarithm, out, highest, summed
        return self.rotary(found, tokens * heads, c, turned), Value(mass)

    def _list(self, tokens: int, places: int, most: int, *, chosen: bool) -> Block:
        """Which row stands at each place of each query's list."""
        size = tokens * places * INT32
        place = self.new(size)
        entry: tuple[Block, ...] = ()
        if chosen:
            inside = self.new(size)
            cast = self.new(tokens * most * INT32), self.new(tokens * places * INT64)
            entry = inside, self.new(size)
            del cast, inside
        elif most:
            entry = (self.new(size),)
        if most:
            seen = [self.new(tokens * places) for _ in range(3)][1:]
            moved = self.new(size)
            rest = self.new(size)
            del seen, moved
        else:
            rest = self.new(size)
        del place, entry
        short, first = self.new(tokens * places), self.new(size)
        out = self.new(size)
        del short, first, rest
        return out

    def _mass(self, tokens: int, heads: int, topk: int, c: int) -> Block:
        """Probabilities of chosen entries, summed over heads: what the operator keeps to itself."""
        parts = self.new(tokens * topk * FP32)
        keys = scores = None
        for start in range(0, tokens, _QUERIES)[:2]:  # more of them do the same
            chunk = min(_QUERIES, tokens - start)
            keys = self.new(chunk * topk * c * BF16)
            narrow = self.new(chunk * heads * topk * BF16)
            wide = self.new(chunk * heads * topk * FP32)
            del narrow
            scores = self.new(chunk * heads * topk * FP32)
            del wide
            apart = self.new(chunk * heads * topk * FP32)
            share = self.new(chunk * heads * topk * FP32)
            del apart, share
        del keys, scores
        made = self.new(tokens * topk * FP32)
        del parts
        return made

    def select_entries(self, tokens: int, heads: int, num_entries: int, topk: int, c: int, ratio: int) -> Value:
        """The operator chooses for tokens that see more than `topk` entries; counted for a row's last slice."""
        chosen = tokens * topk * INT64
        entry, seen = self.new(chosen), self.new(tokens * topk)
        every = self.new(chosen)
        del seen
        choosing = max(min(tokens, ratio * (num_entries - topk - 1) + 1), 0)
        given = self.new(choosing * heads * c * BF16), self.new(choosing * heads * (BF16 + FP32))
        found = self.new(choosing * topk * INT32)
        del given
        moved = self.new(choosing * topk * INT64), self.new(choosing * topk * INT64)
        ordered = self.new(choosing * topk * INT64), self.new(choosing * topk * INT64)
        del moved
        spread = self.new(chosen)
        out = self.new(chosen)
        del entry, every, found, ordered, spread
        return Value(out)

    def indexer_loss(
        self,
        queries: Value,
        keys: Value,
        weights: Value,
        selected: Value,
        mass: Value,
        *,
        tokens: int,
        heads: int,
        c: int,
        entries: int,
        topk: int,
    ) -> Value:
        """The reference's: a chunk of queries at a time, made again in backward."""
        numbers = tokens * heads * c * BF16

        def shown() -> list[int]:
            return [min(_QUERIES, tokens - start) for start in range(0, tokens, _QUERIES)[:3]]  # the rest alike

        def forward(chunk: int) -> tuple[Block, ...]:
            picked, products = self.new(chunk * topk * c * BF16), self.new(chunk * heads * topk * BF16)
            positive, wide = self.new(chunk * heads * topk * BF16), self.new(chunk * heads * topk * FP32)
            del products
            return picked, positive, wide, *[self.new(chunk * topk * FP32) for _ in range(6)]

        for chunk in shown():
            forward(chunk)
        loss = self.new(4)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dqueries = dkeys = dweights = None
            for chunk in shown():
                held = forward(chunk)
                wide = self.new(chunk * heads * topk * FP32)
                narrow, threshold = self.new(chunk * heads * topk * BF16), self.new(chunk * heads * topk * BF16)
                held = held[:1]  # of the loss itself all has gone
                del wide, narrow
                dpicked, part = self.new(chunk * topk * c * BF16), self.new(chunk * heads * c * BF16)
                del threshold, held
                spread = self.new(entries * c * BF16)
                dkeys = spread if dkeys is None else self.new(entries * c * BF16)
                del spread, dpicked
                spread = self.new(tokens * heads * FP32)
                dweights = spread if dweights is None else self.new(tokens * heads * FP32)
                spread = self.new(numbers)
                del part
                dqueries = spread if dqueries is None else self.new(numbers)
                del spread
            return dqueries, dkeys, dweights

        kept = [queries, keys, weights, selected, mass]
        return self.graph.node(backward, [queries, keys, weights], [loss], kept)[0]

    # ---- experts and head ---------------------------------------------------------------------------

    def experts(
        self, x: Value, weights: Value, *, tokens: int, top_k: int, counts: Sequence[int], d: int, f: int
    ) -> Value:
        """Grouped products: each choice's row, sorted by expert."""
        rows, experts = tokens * top_k, len(counts)
        up_, down = experts * 2 * f * d, experts * d * f
        chosen, dropped = self.new(rows * INT64), self.new(rows)
        spread, place = self.new(rows * d * BF16), self.new(rows * INT32)
        scale = self.new(rows * FP32)
        cast = self.new(up_ * BF16)
        hidden = self.new(rows * 2 * f * BF16)
        del cast
        scaled = self._scaled(rows, f, self.new(rows * f * BF16))
        cast = self.new(down * BF16)
        result = self.new(rows * d * BF16)
        del cast
        out = self.new(tokens * d * BF16)
        del spread, scaled, result

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            grad_rows = self.new(rows * d * BF16)
            cast = self.new(down * BF16)
            dscaled = self.new(rows * f * BF16)
            del cast
            activation = self.new(rows * f * BF16)
            dscale = self._dscale(rows, f)
            given = self._scaled(rows, f)
            dhidden = self._swiglu_back(rows, f)
            del given, dscaled
            dx = self._dx(up_, rows, tokens, d)
            x_in = saved[0]

            def of_up() -> Block:
                assert dhidden is not None and x_in is not None  # noqa: PT018
                again = self.new(rows * d * BF16)
                made = self.new(up_ * FP32)
                del again
                return made

            def of_down() -> Block:
                assert grad_rows is not None
                scaled = self._scaled(rows, f, activation)
                made = self.new(down * FP32)
                del scaled
                return made

            if self.late:
                self.pending.append(lambda: self.weigh("ffn.experts.gate_up", of_up()))
                self.pending.append(lambda: self.weigh("ffn.experts.down", of_down()))
            else:
                first, second = of_up(), of_down()
                self.weigh("ffn.experts.gate_up", first)
                self.weigh("ffn.experts.down", second)
                del first, second
            dweights = self.new(rows * FP32)
            del dscale
            return dx, dweights

        kept: list[Value | Block | None] = [x, chosen, dropped, place, scale, hidden]
        return self.graph.node(backward, [x, weights], [out], kept)[0]

    def _dx(self, weights: int, rows: int, tokens: int, d: int) -> Block:
        """The gradient of the tokens, by so many weights."""
        cast = self.new(weights * BF16)
        back = self.new(rows * d * BF16)
        del cast
        made = self.new(tokens * d * BF16)
        del back
        return made

    def _dscale(self, rows: int, f: int) -> Block:
        """The gradient of rows' weights, of products in fp32."""
        wide = self.new(rows * f * FP32), self.new(rows * f * FP32)
        product = self.new(rows * f * FP32)
        del wide
        made = self.new(rows * FP32)
        del product
        return made

    def _scaled(self, rows: int, f: int, activation: Block | None = None) -> Block:
        """Rows times their weights, in fp32 on the way; `activation` is held until then."""
        wide, product = self.new(rows * f * FP32), self.new(rows * f * FP32)
        del wide
        made = self.new(rows * f * BF16)
        del product, activation
        return made

    def cross_entropy(self, hidden: Value, tokens: int, vocabulary: int, d: int) -> Value:
        """Gradients are formed in forward, the head's as a whole from the beginning."""
        cast, log_probs = self.new(vocabulary * d * BF16), self.new(tokens * FP32)
        dhidden, dhead = self.new(tokens * d * BF16), self.new(vocabulary * d * FP32)
        logits = log_prob = dlogits = None
        for start in range(0, tokens, _LOGITS)[:2]:  # more of them do the same
            size = min(_LOGITS, tokens - start) * vocabulary
            narrow = self.new(size * BF16)
            logits = self.new(size * FP32)
            del narrow
            log_prob = self.new(size * FP32)
            wide = self.new(size * FP32)
            dlogits = self.new(size * BF16)
            del wide
            part = self.new(vocabulary * d * BF16)
            del part
        del cast, log_probs, logits, log_prob, dlogits
        return self._loss(hidden, dhidden, dhead)
