"""What each operation of the model makes, keeps and takes, in bytes: `ops/cpu`, `ops/linear.py` and the exchanges
of `parallel/`, without their arithmetic.

Each function here has the name of the operation it stands for and the same order of births; what is not
dead after it is what the real one keeps. Small things that do not grow with tokens or weights are left out.
Weights are fp32 and cast where they are used; `Rank.weigh` is told each weight's gradient. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fullweight.planner.graph import Graph, Value
from fullweight.planner.tape import GRADIENTS, Block, Tape

FP32, BF16, INT64, INT32 = 4, 2, 8, 4
_BLOCK, _CHUNK, _SCORES = 32, 256, 1 << 20  # of ops/cpu/attention.py
_PRODUCTS = 1 << 24  # index products at once in a rehearsal
_GROUP, _LARGE = 1024, 512  # of ops/cpu/experts.py
_LOGITS, _ROWS = 1 << 23, 512  # of ops/cpu/loss.py

Back = tuple[Block | None, ...]


def up(value: int, step: int) -> int:
    """The next multiple."""
    return -(-value // step) * step


@dataclass
class Operations:
    """The operations of one pass. Sizes of activations are for `BF16` numbers unless they say otherwise.

    `weigh(name, block)` takes a weight's gradient; with `late`, products of weights are put off until `finish`.
    """

    tape: Tape
    graph: Graph
    weigh: Callable[[str, Block], None]
    late: bool = False
    pending: list[Callable[[], None]] = field(default_factory=list)
    marked: bool = False  # the head's gradient that the optimiser gets is marked from its birth

    def new(self, num_bytes: float) -> Block:
        return self.tape.new(num_bytes)

    def finish(self) -> None:
        """Form the weight gradients that were put off."""
        while self.pending:
            self.pending.pop(0)()

    def _later(self, product: Callable[[], None]) -> None:
        if self.late:
            self.pending.append(product)
        else:
            product()

    # ---- products -----------------------------------------------------------------------------------

    def linear(self, name: str, x: Value, rows: int, inputs: int, outputs: int) -> Value:
        """Rows by a weight [outputs, inputs], cast to BF16 and let go."""
        numbers = inputs * outputs
        cast = self.new(numbers * BF16)
        out = self.new(rows * outputs * BF16)
        del cast
        needs = x.source is not None

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = None
            if needs:
                cast = self.new(numbers * BF16)
                dx = self.new(rows * inputs * BF16)
                del cast
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                narrow = self.new(numbers * BF16)
                wide = self.new(numbers * FP32)
                del narrow
                self.weigh(name, wide)

            if needs:
                self._later(product)
            else:
                product()
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]

    def again_linear(self, rows: int, inputs: int, outputs: int) -> Callable[[Block], Block]:
        """`linear`, made again from what was kept."""

        def again(_: Block) -> Block:
            cast = self.new(inputs * outputs * BF16)
            made = self.new(rows * outputs * BF16)
            del cast
            return made

        return again

    def grouped_linear(self, name: str, x: Value, rows: int, groups: int, inputs: int, outputs: int) -> Value:
        """Block-diagonal: `groups` of a weight [outputs, inputs] each."""
        numbers = groups * inputs * outputs
        cast = self.new(numbers * BF16)
        out = self.new(rows * groups * outputs * BF16)
        self.new(rows * outputs * BF16)
        del cast

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = self.new(rows * groups * inputs * BF16)
            cast = self.new(numbers * BF16)
            self.new(rows * inputs * BF16)
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                made = self.new(numbers * FP32)
                self.new(inputs * outputs * BF16)
                self.weigh(name, made)

            self._later(product)
            del cast
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]

    def wide_linear(self, name: str, x: Value, rows: int, inputs: int, outputs: int) -> Value:
        """In fp32: the rows are cast, the weight is not."""
        cast = self.new(rows * inputs * FP32)
        out = self.new(rows * outputs * FP32)
        del cast
        needs = x.source is not None

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = None
            if needs:
                wide = self.new(rows * inputs * FP32)
                dx = self.new(rows * inputs * BF16)
                del wide
            grad, kept = gradients[0], saved[0]

            def product() -> None:
                assert grad is not None and kept is not None  # noqa: PT018
                wide = self.new(rows * inputs * FP32)
                made = self.new(inputs * outputs * FP32)
                del wide
                self.weigh(name, made)

            if needs:
                self._later(product)
            else:
                product()
            return (dx,)

        return self.graph.node(backward, [x], [out], [x])[0]

    # ---- norms, streams -----------------------------------------------------------------------------

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
        """RMSNorm, with a rotation of the last `turned` channels or without: rows' factors are kept beside the
        input."""
        out, factors = self.new(rows * width * size), self.new(rows * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dx = self.new(rows * width * size)
            if name is not None:
                self.weigh(name, self.new(width * FP32))
            return (dx,)

        value = self.graph.node(backward, [x], [out], [x, factors])[0]
        if keep:

            def again(_: Block) -> Block:
                out = self.new(rows * width * size)
                self.new(rows * FP32)
                return out

            self.graph.keep(value, again, x)
        return value

    def rotary(self, x: Value, rows: int, width: int, turned: int, size: int = BF16) -> Value:
        """A rotation alone keeps only its tables."""
        out = self.new(rows * width * size)
        return self.graph.node(lambda g, s: (self.new(rows * width * size),), [x], [out])[0]

    def swiglu(self, hidden: Value, rows: int, f: int) -> Value:
        """Keeps its input."""
        out = self.new(rows * f * BF16)
        value = self.graph.node(lambda g, s: (self.new(rows * 2 * f * BF16),), [hidden], [out], [hidden])[0]
        return self.graph.keep(value, lambda _: self.new(rows * f * BF16), hidden)

    def hyper_pre(
        self, name: str, streams: Value, tokens: int, n: int, d: int, rounds: int
    ) -> tuple[Value, Value, Value]:
        """(input, post, comb); comb by so many rounds of Sinkhorn."""
        maps = (2 + n) * n
        x, post = self.new(tokens * d * BF16), self.new(tokens * n * FP32)
        comb, pre = self.new(tokens * n * n * FP32), self.new(tokens * n * FP32)
        logits, factors = self.new(tokens * maps * FP32), self.new(tokens * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dstreams = self.new(tokens * n * d * BF16)
            partial = self.new(maps * n * d * FP32)
            self.weigh(f"{name}_fn", self.new(maps * n * d * FP32))
            del partial
            return (dstreams,)

        made = self.graph.node(backward, [streams], [x, post, comb, pre], [streams, pre, logits, factors])
        self.graph.keep(made[0], lambda *_: self.new(tokens * d * BF16), streams, Value(pre))
        return made[0], made[1], made[2]

    def hyper_post(self, streams: Value, y: Value, post: Value, comb: Value, tokens: int, n: int, d: int) -> Value:
        """The streams behind a sublayer."""
        out = self.new(tokens * n * d * BF16)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            sizes = tokens * n * d * BF16, tokens * d * BF16, tokens * n * FP32, tokens * n * n * FP32
            return tuple([self.new(size) for size in sizes])

        inputs = [streams, y, post, comb]
        return self.graph.node(backward, inputs, [out], inputs)[0]

    def again_post(self, tokens: int, n: int, d: int) -> Callable[..., Block]:
        """`hyper_post`, made again from what was kept."""
        return lambda *_: self.new(tokens * n * d * BF16)

    def hyper_head(self, name: str, streams: Value, tokens: int, n: int, d: int) -> Value:
        x, pre = self.new(tokens * d * BF16), self.new(tokens * n * FP32)
        logits, factors = self.new(tokens * n * FP32), self.new(tokens * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            dstreams = self.new(tokens * n * d * BF16)
            partial = self.new(n * n * d * FP32)
            self.weigh(f"{name}_fn", self.new(n * n * d * FP32))
            del partial
            return (dstreams,)

        return self.graph.node(backward, [streams], [x], [streams, pre, logits, factors])[0]

    def plain(self, num_bytes: int, *inputs: Value, saved: Sequence[Value] = ()) -> Value:
        """An element-wise operation whose gradients are as large as its output and pass on to every input."""
        out = self.new(num_bytes)
        count = len(inputs)
        backward = lambda g, s: (g[0],) * count  # noqa: E731
        return self.graph.node(backward, list(inputs), [out], list(saved))[0]

    # ---- attention ----------------------------------------------------------------------------------

    def compress(
        self, name: str, values: Value, gates: Value, rows: int, entries: int, width: int, c: int, ratio: int
    ) -> Value:
        """Windows of `ratio` of [rows, width] fp32 pooled to [entries, c] fp32."""
        out = self.new(entries * c * FP32)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            given = self.new(rows * width * FP32), self.new(rows * width * FP32)
            self.weigh(f"{name}.ape", self.new(ratio * width * FP32))
            return given

        return self.graph.node(backward, [values, gates], [out], [values, gates])[0]

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
        """(out, mass): queries [tokens, heads, c] over keys [front + tokens, c] and entries [num_entries, c].

        `topk` entries are chosen for each token, or all are read in order when it is 0.
        """
        before, width = up(window, _BLOCK), up(window, _BLOCK) + _BLOCK
        chosen = topk if selected is not None else 0
        chunk = min(max(_CHUNK, _SCORES // (heads * (width + chosen)) // _BLOCK * _BLOCK), tokens)
        reach = chosen or min(up(num_entries, 64 if num_entries > 256 else 16), num_entries)
        queries = tokens * heads * c * BF16

        has_entries = entries is not None

        def pad() -> Block | None:
            return self.new((before + tokens) * c * BF16) if before != front else None

        ranges, padded = self.new(tokens * 4 * INT32), pad()
        out, lse = self.new(queries), self.new(tokens * heads * FP32)
        mass = self.new(tokens * chosen * FP32)

        sizes = tuple(min(chunk, tokens - start) for start in range(0, tokens, chunk)[:2])  # more do the same

        def chunks() -> Iterator[tuple[int, int, tuple[Block, ...]]]:
            for size in sizes:
                keys = self.new(size // _BLOCK * width * c * BF16)
                picked = self.new(size * chosen * c * BF16) if chosen else None
                yield size, size * heads, (keys, picked) if picked is not None else (keys,)

        def scores(rows: int, entry: bool) -> Block:
            return self.new(rows * (reach if entry else width) * BF16)

        turn = in_window = weighted = None
        for turn in chunks():
            rows = turn[1]
            in_window = scores(rows, False), scores(rows, True) if has_entries else None
            weighted = self.new(rows * c * BF16)
        del ranges, padded, turn, in_window, weighted

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            ranges, padded = self.new(tokens * 4 * INT32), pad()
            delta = self.new(tokens * heads * FP32)
            turned = self.new(queries)
            dq = self.new(queries)
            dkv = self.new((before + tokens) * c * FP32)
            dentries = self.new(num_entries * c * FP32) if has_entries else None
            turn = in_window = in_entries = None
            for turn in chunks():
                size, rows = turn[:2]
                in_window = scores(rows, False), scores(rows, False)
                self.new(size // _BLOCK * width * c * BF16)
                if has_entries:
                    in_entries = scores(rows, True), scores(rows, True)
                    self.new((size * chosen if chosen else reach) * c * BF16)
                self.new(rows * c * BF16)
            dsink = self.new(tokens * heads * FP32), self.new(tokens * heads * FP32)
            del dsink
            keys = self.new((front + tokens) * c * BF16)
            made = self.new(num_entries * c * BF16) if dentries is not None else None
            del ranges, padded, delta, turned, dkv, dentries, turn, in_window, in_entries
            return dq, keys, made, None

        kept = [q, keys, entries, selected, out, lse]
        found = self.graph.node(backward, [q, keys, entries, None], [out], kept)
        return found[0], Value(mass)

    def select_entries(self, tokens: int, heads: int, num_entries: int, topk: int, c: int, ratio: int) -> Value:
        """The indices; nothing flows back. Products exist for a few queries at a time."""
        out = self.new(tokens * topk * INT64)
        size = max(_BLOCK, min(_CHUNK, _PRODUCTS // (heads * max(num_entries, 1))) // _BLOCK * _BLOCK)
        products = None
        for start in range(0, tokens, size)[:2]:
            products = self.new(min(size, tokens - start) * heads * num_entries * BF16)
        del products
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
        """Its gradients are formed in forward and kept in place of everything else."""
        dqueries, dkeys = self.new(tokens * heads * c * BF16), self.new(entries * c * FP32)
        dweights = self.new(tokens * heads * FP32)
        picked = products = None
        for start in range(0, tokens, _CHUNK)[:2]:
            chunk = min(_CHUNK, tokens - start)
            picked = self.new(chunk * topk * c * BF16)
            products = self.new(chunk * heads * topk * BF16)
            self.new(chunk * heads * c * BF16)
            self.new(chunk * topk * c * BF16)
        del picked, products
        loss = self.new(4)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            wide = self.new(entries * c * FP32)
            keys = self.new(entries * c * BF16)
            del wide
            weights = self.new(tokens * heads * FP32)
            return self.new(tokens * heads * c * BF16), keys, weights

        return self.graph.node(backward, [queries, keys, weights], [loss], [dqueries, dkeys, dweights])[0]

    # ---- experts ------------------------------------------------------------------------------------

    def experts(
        self, x: Value, weights: Value, *, tokens: int, top_k: int, counts: Sequence[int], d: int, f: int
    ) -> Value:
        """Rows by expert: `counts` of each, over `tokens` x `top_k` choices."""
        rows, choices, experts = sum(counts), tokens * top_k, len(counts)
        token, place = self.new((rows + 1) * INT64), self.new(choices * INT64)
        scale = self.new((rows + 1) * FP32)
        hidden = self.new(rows * 2 * f * BF16)
        out_rows = self.new((rows + 1) * d * BF16)
        groups = grouped(counts)
        shown = groups if self.late else groups[:3]  # more of them do the same

        cast = None
        for number, count in shown:
            cast = self.new(number * 2 * f * d * BF16), self.new(number * d * f * BF16)
            self.new(count * d * BF16)
            self.new(count * f * BF16)
        out = self.new(tokens * d * BF16)
        del out_rows, cast

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            weighed = (
                None if self.late else (self.new(experts * 2 * f * d * FP32), self.new(experts * d * f * FP32))
            )
            dscale, dx_rows = self.new((rows + 1) * FP32), self.new((rows + 1) * d * BF16)
            kept: list[tuple[Block, Block]] = []
            grad_rows = pair = dhidden = buffers = None
            for number, count in shown:
                grad_rows = self.new(count * d * BF16)
                pair = self.new(count * f * BF16), self.new(count * f * BF16)
                dhidden = self.new(count * 2 * f * BF16)
                self.new(number * d * f * BF16)
                buffers = (*pair, dhidden)  # holds those of the turn before until now
                if weighed is not None:
                    self.new(number * d * f * BF16)
                    again = self.new(count * d * BF16)
                    narrow = self.new(number * 2 * f * d * BF16)
                    del again, narrow
                self.new(number * 2 * f * d * BF16)
                if self.late:
                    kept.append((dhidden, pair[1]))
            # what the loop's last turn made is there to the end
            if self.late:
                grad, rows_in = gradients[0], saved[0]

                def product(name: str, numbers: int, each: int) -> None:
                    assert grad is not None and rows_in is not None and kept is not None  # noqa: PT018
                    made = self.new(experts * numbers * FP32)
                    for number, count in groups:
                        gathered = self.new(count * each * BF16)
                        narrow = self.new(number * numbers * BF16)
                        del gathered, narrow
                    self.weigh(name, made)

                self.pending.append(lambda: product("ffn.experts.gate_up", 2 * f * d, d))
                self.pending.append(lambda: product("ffn.experts.down", d * f, d))
            dx = self.new(tokens * d * BF16)
            dweights = self.new(choices * FP32)
            del dscale, dx_rows
            if weighed is not None:
                self.weigh("ffn.experts.gate_up", weighed[0])
                self.weigh("ffn.experts.down", weighed[1])
            del grad_rows, pair, dhidden, buffers
            return dx, dweights

        return self.graph.node(backward, [x, weights], [out], [x, hidden, scale], (token, place))[0]

    # ---- exchanges ----------------------------------------------------------------------------------

    def exchange(self, x: Value, sent: int, received: int) -> Value:
        """Bytes to other ranks for bytes from them."""
        out = self.new(received)
        self.tape.sent(x.block, out)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            back = self.new(sent)
            self.tape.sent(gradients[0], back)
            return (back,)

        return self.graph.node(backward, [x], [out])[0]

    def gather(self, x: Value, num_bytes: int, ranks: int, size: int = BF16) -> Value:
        """All ranks' rows; the gradient is the sum of all ranks'."""
        out = self.new(num_bytes * ranks)
        self.tape.sent(x.block, out)
        return self.graph.node(lambda g, s: (self.summed(g[0], num_bytes, ranks, size),), [x], [out])[0]

    def scatter_sum(self, x: Value, num_bytes: int, ranks: int, size: int = BF16) -> Value:
        """This rank's part, of `num_bytes`, of a sum over ranks."""
        out = self.summed(x.block, num_bytes, ranks, size)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            back = self.new(num_bytes * ranks)
            self.tape.sent(gradients[0], back)
            return (back,)

        return self.graph.node(backward, [x], [out])[0]

    def summed(self, block: Block, num_bytes: int, ranks: int, size: int) -> Block:
        """Everybody's part of everybody's rows, added up in fp32."""
        parts = self.new(num_bytes * ranks)
        self.tape.sent(block, parts)
        wide = self.new(num_bytes * FP32 // size)
        if size == FP32:
            return wide
        return self.new(num_bytes)

    # ---- the head -----------------------------------------------------------------------------------

    def cross_entropy(self, hidden: Value, tokens: int, vocabulary: int, d: int) -> Value:
        """Gradients are formed in forward, a few logits at a time."""
        cast, log_probs = self.new(vocabulary * d * BF16), self.new(tokens * FP32)
        dhidden, dhead = self.new(tokens * d * BF16), None
        rows = max(_LOGITS // vocabulary, _ROWS)
        logits = part = None
        for start in range(0, tokens, rows)[:2]:  # more of them do the same
            logits = self.new(min(rows, tokens - start) * vocabulary * BF16)
            part = self.new(vocabulary * d * BF16)
            if dhead is None:
                dhead = self.new(vocabulary * d * FP32)
        del cast, log_probs, logits, part
        assert dhead is not None
        return self._loss(hidden, dhidden, dhead)

    def _loss(self, hidden: Value, dhidden: Block, dhead: Block) -> Value:
        """The loss, with the gradients that were formed beside it."""
        if self.marked:
            self.tape.mark(dhead, GRADIENTS)

        def backward(gradients: Sequence[Block], saved: Sequence[Block]) -> Back:
            self.weigh("head.weight", saved[1])
            return (saved[0],)

        return self.graph.node(backward, [hidden], [self.new(4)], [dhidden, dhead])[0]


def grouped(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(experts, rows) that pass between products together."""
    found, number, rows = [], 0, 0
    for count in counts:
        if number and rows + count > _GROUP:
            found.append((number, rows))
            number, rows = 0, 0
        number, rows = number + 1, rows + count
    return [*found, (number, rows)] if number else found


def rounded_rows(rows: int) -> int:
    """What an expert's rows are rounded up to."""
    return up(rows, 64 if rows > _LARGE else 32)
