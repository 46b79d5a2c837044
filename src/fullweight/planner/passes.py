"""Forward and backward of DeepSeek-V4's parts over sizes: blocks, embedding, head and MTP block.

The order is that of `models/deepseek_v4` (`block.py`, `attention.py`, `moe.py`) with the recompute policies of
`ops/recompute.py`; sizes follow from the configuration and from how the layout cuts rows, heads and experts.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.parallel.config import Layout
from fullweight.planner.graph import Graph, Value
from fullweight.planner.operations import BF16, FP32, INT32, INT64, Operations, rounded_rows
from fullweight.planner.sharding import Sharding
from fullweight.planner.tape import Block


@dataclass(frozen=True)
class Row:
    """One micro-batch on one rank: tokens of the whole row, and the load of its experts over the mean."""

    tokens: int
    layout: Layout
    skew: float = 1.0
    operations: str = "cpu"  # a name of `operations.SETS`
    most: int | None = None  # rows that the rank's experts take at most; they drop the rest

    @property
    def here(self) -> int:
        """Tokens of the rank's slice."""
        return self.tokens // self.layout.num_slices

    @property
    def span(self) -> int:
        """Tokens whose queries it runs."""
        return self.here * self.layout.tensor

    def received(self, top_k: int) -> int:
        """Rows that its experts get."""
        rows = int(self.here * top_k * (self.skew if self.layout.expert > 1 else 1.0))
        return rows if self.most is None else min(rows, self.most)


@dataclass
class Blocks:
    """The block of one layer on one rank; layer number `num_hidden_layers` is the MTP block's."""

    config: DeepSeekV4Config
    row: Row
    layer: int
    policy: str
    ops: Operations
    sharding: Sharding | None = None  # where weights come and go with every pass

    @property
    def graph(self) -> Graph:
        return self.ops.graph

    def mix(self, streams: Value) -> Value:
        """The block, by its policy: streams of [tokens, n, d] to streams."""
        if self.policy == "full":
            return self.graph.remade(self._mix, streams)
        return self._mix(streams)

    def _mix(self, streams: Value) -> Value:
        c, ops, s = self.config, self.ops, self.row.here
        n, d = c.hc_mult, c.hidden_size
        self.graph.book = []
        # names live as long as the model's: what it still holds takes memory
        first = ops.hyper_pre("hc_attn", streams, s, n, d, c.hc_sinkhorn_iters)
        y = self._attention(ops.norm("attn_norm.weight", first[0], s, d))
        middle = ops.hyper_post(streams, y, first[1], first[2], s, n, d)
        self.graph.keep(middle, ops.again_post(s, n, d), streams, y, first[1], first[2])
        second = ops.hyper_pre("hc_ffn", middle, s, n, d, c.hc_sinkhorn_iters)
        y = self._experts(ops.norm("ffn_norm.weight", second[0], s, d))
        return ops.hyper_post(middle, y, second[1], second[2], s, n, d)

    # ---- attention ----------------------------------------------------------------------------------

    def _attention(self, x: Value) -> Value:
        c, ops, row = self.config, self.ops, self.row
        s, d, width, rank, tensor = row.here, c.hidden_size, c.head_dim, c.q_lora_rank, row.layout.tensor
        is_mtp = self.layer == c.num_hidden_layers
        kind = LayerKind.SLIDING if is_mtp else c.layer_kind(self.layer)
        heads, span = c.num_attention_heads // tensor, row.span
        latent = ops.norm("attn.q_norm.weight", ops.linear("attn.wq_a.weight", x, s, d, rank), s, rank)
        rope = c.qk_rope_head_dim
        kv = ops.linear("attn.wkv.weight", x, s, d, width)
        kv = ops.norm("attn.kv_norm.weight", kv, s, width, turned=rope)
        wide = ops.gather(latent, s * rank * BF16, tensor) if tensor > 1 else latent
        q = ops.linear("attn.wq_b.weight", wide, span, rank, heads * width)
        self.graph.keep(q, ops.again_linear(span, rank, heads * width), wide)
        del wide
        q = ops.norm(None, q, span * heads, width, turned=rope)
        out = self._packed(x, latent, q, kv, kind)
        groups = c.o_groups // tensor
        mixed = ops.grouped_linear("attn.wo_a.weight", out, span, groups, heads * width // groups, c.o_lora_rank)
        result = ops.linear("attn.wo_b.weight", mixed, span, groups * c.o_lora_rank, d)
        self.graph.keep(result, ops.again_linear(span, groups * c.o_lora_rank, d), mixed)
        del mixed
        return ops.scatter_sum(result, s * d * BF16, tensor) if tensor > 1 else result

    def _packed(self, x: Value, latent: Value, q: Value, kv: Value, kind: LayerKind) -> Value:
        """Window and entries for the local heads, and the indexer's loss."""
        c, ops, row = self.config, self.ops, self.row
        s, width, tensor = row.here, c.head_dim, row.layout.tensor
        entries, selected, index = None, None, None
        ratio = 0 if kind is LayerKind.SLIDING else c.compress_ratios[self.layer]
        num_entries = row.tokens // ratio if ratio else 0
        topk = min(c.index_topk, num_entries) if kind is LayerKind.CSA else 0
        if ratio:
            pooled = self._compressed("attn.compressor", x, ratio, width)
            entries = pooled[0]
            if kind is LayerKind.CSA:
                index = self._indexer(x.detached(), latent.detached(), num_entries, topk)
                selected = index[3]
                if tensor > 1:
                    selected = self._widened(selected, s * topk, tensor)
        keys, front = kv, 0
        if tensor > 1:
            keys = ops.gather(kv, s * width * BF16, tensor)
        if row.layout.context > 1:
            front = c.sliding_window - 1
            keys = self._before([keys], row.span, front, width * BF16)[0]
        out, mass = ops.attention(
            q,
            keys,
            entries,
            selected,
            tokens=row.span,
            front=front,
            heads=c.num_attention_heads // tensor,
            c=width,
            window=c.sliding_window,
            num_entries=num_entries,
            topk=topk,
            turned=c.qk_rope_head_dim,
        )
        if index is None:
            return out
        if tensor > 1:
            mass = Value(ops.summed(mass.block, s * topk * FP32, tensor, FP32))
        loss = ops.indexer_loss(
            index[0],
            index[1][0],
            index[2],
            index[3],
            mass,
            tokens=s,
            heads=c.index_n_heads,
            c=c.index_head_dim,
            entries=num_entries,
            topk=topk,
        )
        return self._with(out, loss)

    def _with(self, value: Value, loss: Value) -> Value:
        """The value, whose backward pass goes on to the loss too: both are ready when what follows is done."""

        def backward(gradients: list[Block], saved: list[Block]) -> tuple[Block, Block]:
            return gradients[0], self.ops.new(4)

        return self.graph.node(backward, [value, loss], [value.block])[0]

    def _widened(self, selected: Value, numbers: int, tensor: int) -> Value:
        ops = self.ops
        small = ops.new(numbers * INT32)
        gathered = ops.new(numbers * INT32 * tensor)
        ops.tape.sent(small, gathered)
        return Value(ops.new(numbers * INT64 * tensor))

    def _before(self, parts: list[Value], rows: int, front: int, width: int) -> list[Value]:
        """Each part with the last rows of the rank before in front of it."""
        ops = self.ops
        total = front * width * len(parts)
        tails, came = ops.new(total), ops.new(total)
        ops.tape.sent(tails, came)
        out = [ops.new((front + rows) * width) for _ in parts]
        del tails, came

        def joined(block: Block, value: Value) -> Value:
            def backward(gradients: list[Block], saved: list[Block]) -> tuple[Block]:
                back = ops.new(front * width)
                ops.tape.sent(back)
                return (ops.new(rows * width),)

            return self.graph.node(backward, [value], [block])[0]

        return [joined(block, value) for block, value in zip(out, parts, strict=True)]

    def _compressed(self, name: str, x: Value, ratio: int, c: int) -> tuple[Value, Value, Value]:
        """The row's entries of width `c`, and the values and gates that the model keeps beside them."""
        ops, row, s, d = self.ops, self.row, self.row.here, self.config.hidden_size
        overlap = ratio == CSA_RATIO
        width, made = c * (2 if overlap else 1), s // ratio
        values = ops.wide_linear(f"{name}.wkv.weight", x, s, d, width)
        gates = ops.wide_linear(f"{name}.wgate.weight", x, s, d, width)
        front = 0
        if row.layout.num_slices > 1:
            front = (2 * ratio if overlap else ratio) - 1
            values, gates = self._before([values, gates], s, front, width * FP32)
        pooled = ops.compress(name, values, gates, front + s, made, width, c, ratio)
        turned = self.config.qk_rope_head_dim
        normed = ops.norm(f"{name}.norm.weight", pooled, made, c, FP32, keep=False, turned=turned)
        entries = self._narrowed(normed, made * c)
        del normed
        if row.layout.num_slices == 1:
            return entries, values, gates
        gathered = ops.gather(entries, made * c * BF16, row.layout.num_slices)
        return ops.plain(row.tokens // ratio * c * BF16, gathered), values, gates

    def _narrowed(self, value: Value, numbers: int) -> Value:
        """fp32 to BF16, and its gradient back."""
        ops = self.ops
        out = ops.new(numbers * BF16)
        return self.graph.node(lambda g, s: (ops.new(numbers * FP32),), [value], [out])[0]

    def _indexer(
        self, x: Value, latent: Value, entries: int, topk: int
    ) -> tuple[Value, tuple[Value, Value, Value], Value, Value]:
        """(queries, compressed keys, weights, selected)."""
        c, ops, s = self.config, self.ops, self.row.here
        heads, width = c.index_n_heads, c.index_head_dim
        queries = ops.linear("attn.indexer.wq_b.weight", latent, s, c.q_lora_rank, heads * width)
        queries = ops.rotary(queries, s * heads, width, c.qk_rope_head_dim)
        raw = ops.linear("attn.indexer.weights_proj.weight", x, s, c.hidden_size, heads)
        wide = ops.plain(s * heads * FP32, raw)
        del raw
        weights = ops.plain(s * heads * FP32, wide)
        del wide
        keys = self._compressed("attn.indexer.compressor", x, CSA_RATIO, width)
        selected = ops.select_entries(s, heads, entries, topk, width, CSA_RATIO)
        return queries, keys, weights, selected

    # ---- experts ------------------------------------------------------------------------------------

    def _experts(self, x: Value) -> Value:
        c, ops, s = self.config, self.ops, self.row.here
        d, f = c.hidden_size, c.moe_intermediate_size
        _affinity, chosen, weights = self._gate(x)
        if self.policy == "selective":
            routed = self.graph.remade(self._sharded, x, chosen, weights)
        else:
            routed = self._sharded(x, chosen, weights)
        hidden = ops.linear("ffn.shared_experts.gate_up", x, s, d, 2 * f)
        activation = ops.swiglu(hidden, s, f)
        del hidden
        shared = ops.linear("ffn.shared_experts.down", activation, s, f, d)
        del activation
        return ops.plain(s * d * BF16, routed, shared)

    def _gate(self, x: Value) -> tuple[Value, Value, Value]:
        """(affinities, chosen experts, their weights)."""
        c, ops, s = self.config, self.ops, self.row.here
        experts, k = c.n_routed_experts, c.num_experts_per_tok
        hashed = self.layer < c.num_hidden_layers and c.is_hash_layer(self.layer)
        table = s * experts * FP32
        logits = ops.wide_linear("ffn.gate.weight", x, s, c.hidden_size, experts)
        positive = self._pointwise(logits, table)
        floored = self._pointwise(positive, table)
        del positive
        out = ops.new(table)
        affinity = self.graph.node(lambda g, s: (ops.new(table),), [floored], [out], [out])[0]
        del floored, out
        if hashed:
            chosen = Value(ops.new(s * k * INT64))
        else:
            biased = ops.new(table)
            values, chosen = ops.new(s * k * FP32), Value(ops.new(s * k * INT64))
            del biased, values
        picked_block = ops.new(s * k * FP32)
        picked = self.graph.node(lambda g, s: (ops.new(table),), [affinity], [picked_block], [chosen])[0]
        share = ops.new(s * k * FP32)
        small = s * k * FP32
        divided = self.graph.node(lambda g, _: (ops.new(small),), [picked], [share], [picked, ops.new(s * FP32)])[
            0
        ]
        del picked, picked_block, share
        scaled = self.graph.node(lambda g, _: (ops.new(small),), [divided], [ops.new(small)])[0]
        del divided
        if not hashed:
            loss = self._balance(affinity, table, s, k)
            scaled = self._with(scaled, loss)
        return affinity, chosen, scaled

    def _pointwise(self, value: Value, num_bytes: int) -> Value:
        ops = self.ops
        return self.graph.node(lambda g, s: (ops.new(num_bytes),), [value], [ops.new(num_bytes)], [value])[0]

    def _balance(self, affinity: Value, table: int, s: int, k: int) -> Value:
        ops = self.ops
        best = ops.new(table)
        share = self.graph.node(
            lambda g, _: (ops.new(table),), [affinity], [ops.new(table)], [affinity, ops.new(s * FP32)]
        )[0]
        joined = ops.new(table + s * FP32)
        ops.new(table + s * FP32)
        weighed = self.graph.node(lambda g, _: (ops.new(table),), [share], [ops.new(table)])[0]
        del best, joined
        return self.graph.node(lambda g, _: (ops.new(table),), [weighed], [ops.new(4)], [weighed])[0]

    def _sharded(self, x: Value, chosen: Value, weights: Value) -> Value:
        """The routed experts, between FSDP's hooks where they are a unit."""
        sharding, graph = self.sharding, self.graph
        if sharding is None or not sharding.unit.experts:
            return self._routed(x, chosen, weights)
        sharding.enter("experts")
        x, weights = graph.node(sharding.after("experts"), [x, weights], [x.block, weights.block])
        out = self._routed(x, chosen, weights)
        if graph.record is None:
            sharding.leave("experts")
        else:
            sharding.left_gather = None  # a pass of its own to FSDP, whose end lets go of it
        return graph.node(sharding.ahead_of("experts"), [out], [out.block])[0]

    def _routed(self, x: Value, chosen: Value, weights: Value) -> Value:
        c, ops, row = self.config, self.ops, self.row
        s, d, f, k = row.here, c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
        expert = row.layout.expert
        local = c.n_routed_experts // expert
        rows = row.received(k)
        counts = [rounded_rows(rows // local + (i < rows % local)) for i in range(local)]
        if expert == 1:
            return ops.experts(x, weights, tokens=s, top_k=k, counts=counts, d=d, f=f)
        order, place = ops.new(s * k * INT64), ops.new(s * k * INT64)
        plan = (order, place, ops.new(rows * INT64))
        del order, place
        out = ops.new(s * k * d * BF16)
        sums = lambda g, _: (self._summed(s, k, d),)  # noqa: E731
        spread = self.graph.node(sums, [x], [out], (), plan)[0]
        del out
        came = ops.exchange(spread, s * k * d * BF16, rows * d * BF16)
        del spread
        sorted_ = self.graph.node(
            lambda g, _: (ops.new(s * k * FP32),), [weights], [ops.new(s * k * FP32)], (), plan
        )[0]
        scale = ops.exchange(sorted_, s * k * FP32, rows * FP32)
        del sorted_
        result = ops.experts(came, scale, tokens=rows, top_k=1, counts=counts, d=d, f=f)
        back = ops.exchange(result, rows * d * BF16, s * k * d * BF16)
        rows_out = ops.new(s * k * d * BF16)
        made = ops.new(s * d * BF16)
        del rows_out
        spread_back = lambda g, _: (ops.new(s * k * d * BF16),)  # noqa: E731
        return self.graph.node(spread_back, [back], [made], (), plan)[0]

    def _summed(self, s: int, k: int, d: int) -> Block:
        rows = self.ops.new(s * k * d * BF16)
        made = self.ops.new(s * d * BF16)
        del rows
        return made


@dataclass
class Ends:
    """What lies before the first block and behind the last one."""

    config: DeepSeekV4Config
    row: Row
    policy: str
    ops: Operations
    sharding: Sharding | None = None

    def predict(self, streams: Value, following: Value | None) -> Value:
        """Both losses from the last block's streams and the next tokens' embedding."""
        c, ops, s = self.config, self.ops, self.row.here
        n, d = c.hc_mult, c.hidden_size
        hidden = ops.norm("norm.weight", ops.hyper_head("hc_head", streams, s, n, d), s, d, keep=False)
        loss = ops.cross_entropy(hidden, s, c.vocab_size, d)
        del hidden
        if following is None:
            return loss
        return ops.plain(4, loss, self._ahead(streams, following))

    def _ahead(self, streams: Value, following: Value) -> Value:
        c, ops, s, graph = self.config, self.ops, self.row.here, self.ops.graph
        n, d = c.hc_mult, c.hidden_size
        inside = graph.node(lambda g, _: (ops.new(s * d * BF16),), [following], [ops.new(s * d * BF16)])[0]
        sharding = self.sharding
        if sharding is not None:
            sharding.enter("block")
            streams, inside = graph.node(sharding.after("block"), [streams, inside], [streams.block, inside.block])
        token = ops.linear("e_proj.weight", ops.norm("enorm.weight", inside, s, d, keep=False), s, d, d)
        del inside
        graph.book = []
        normed = ops.norm("hnorm.weight", streams, s * n, d)
        projected = ops.linear("h_proj.weight", normed, s * n, d, d)
        del normed
        spread = lambda g, _: (ops.new(s * d * BF16), g[0])  # noqa: E731
        mixed = graph.node(spread, [token, projected], [ops.new(s * n * d * BF16)])[0]
        del token, projected
        block = Blocks(c, self.row, c.num_hidden_layers, self.policy, ops, self.sharding)
        out = block.mix(mixed)
        del mixed
        hidden = ops.norm("norm.weight", ops.hyper_head("hc_head", out, s, n, d), s, d, keep=False)
        if sharding is not None:
            sharding.leave("block")
            hidden = graph.node(sharding.ahead_of("block"), [hidden], [hidden.block])[0]
        return ops.cross_entropy(hidden, s, c.vocab_size, d)
