"""Layouts of ranks: where each rank stands, and what is refused before a process group exists."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import Layout, ParallelConfig

TINY = DeepSeekV4Config.preset("tiny")  # 8 experts, 4 heads, 2 groups, 4 layers, window 16, ratios 4 and 128


def layout(world: int, row_tokens: int = 512, rows: int = 8, **axes: Any) -> Layout:
    return ParallelConfig(**axes).layout(world, TINY, row_tokens, rows)


def test_ranks_stand_where_the_nested_loops_put_them() -> None:
    """Pipeline slowest, tensor fastest; expert ranks are neighbours within shard x context x tensor."""
    found = layout(32, pipeline=2, replicate=2, context=2, tensor=2, expert=4)
    assert (found.shard, found.dense, found.expert_shard, found.data_size, found.num_slices) == (2, 8, 2, 4, 4)
    assert found.world == 32
    places = product(range(2), range(2), range(2), range(2), range(2))
    for rank, (stage, replica, shard, context, tensor) in enumerate(places):
        assert found.stage(rank) == stage
        assert found.data_rank(rank) == replica * 2 + shard
        assert found.slice_index(rank) == context * 2 + tensor
        assert found.expert_rank(rank) == (shard * 4 + context * 2 + tensor) % 4
        assert found.counts_row(rank) == ((stage, context, tensor) == (0, 0, 0))
    assert sum(map(found.counts_row, range(32))) == found.data_size, "every row counts once"


def test_a_plain_run_is_data_parallel() -> None:
    """Without a section, all ranks share the parameters and each has its own rows."""
    found = layout(4)
    assert found == Layout(shard=4)
    assert found.axes() == {"shard": 4}
    assert [found.data_rank(r) for r in range(4)] == [0, 1, 2, 3]
    assert layout(1) == Layout()
    assert layout(1).axes() == {}


@pytest.mark.parametrize(
    ("world", "axes", "said"),
    [
        (6, {"replicate": 4}, r"replicate 4 = 4 does not divide the number of ranks \(6\); start 4 or 8"),
        (2, {"context": 4}, r"does not divide the number of ranks \(2\); start 4 ranks"),
        (8, {"replicate": 2, "shard": 2}, r"needs 4 ranks, there are 8; use parallel.shard=4"),
        (4, {"expert": 3}, r"must divide the 8 routed experts and the 4 ranks .*; use 2 or 4"),
        (8, {"expert": 16}, r"expert \(16\).*; use 8$"),
        (4, {"tensor": 4}, r"must divide the 4 attention heads and the 2 groups .*; use 2$"),
        (8, {"context": 8}, r"= 8 must cut a row of 512 tokens into equal parts of at least 128 .*; use 4 in all"),
        (3, {"rows": 8}, r"rows_per_step \(8\) is not divisible by the number of ranks \(3\); use 6 or 9"),
        (6, {"context": 2}, r"by the number of data ranks, replicate x shard \(3\); use 6 or 9"),
        (1, {"virtual_stages": 2}, r"virtual_stages needs parallel.pipeline above 1"),
        (2, {"reshard_after": "micro_batch"}, r"reshard_after needs parallel.pipeline above 1"),
        (
            2,
            {"pipeline": 2, "schedule": "zbv", "virtual_stages": 2, "reshard_after": "micro_batch"},
            r"'micro_batch' .* parallel.schedule='zbv' has passes of a part .*; use schedule='1f1b', or",
        ),
        (2, {"pipeline": 2, "virtual_stages": 2}, r"'1f1b' works with exactly 1 virtual stages"),
        (2, {"pipeline": 2, "schedule": "interleaved"}, r"works with 2 or more .*; use 2"),
        (2, {"pipeline": 2, "schedule": "zbv", "virtual_stages": 3}, r"works with exactly 2"),
        (8, {"pipeline": 8}, r"makes 8 stages of 4 layers; .*pipeline=4"),
        (2, {"pipeline": 2, "stage_layers": (1, 2)}, r"2 stages with 3 layers, expected 2 with 4"),
        (4, {"pipeline": 4, "rows": 2}, r"'1f1b' cannot order the 2 micro-batches of a step.*rows_per_step=4"),
        (
            2,
            {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "rows": 5},
            r"'interleaved' cannot order the 5 .*rows_per_step=4 or 6",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(world: int, axes: dict[str, Any], said: str) -> None:
    """Found, expected, and the nearest legal choice."""
    with pytest.raises(ConfigError, match=said):
        layout(world, **axes)


def test_the_published_512_layout_is_legal() -> None:
    """TP2 x PP8 x EP64 of the reference run, with two tokens' slices a row."""
    pro = DeepSeekV4Config.preset("pro")
    found = ParallelConfig(pipeline=8, tensor=2, expert=64).layout(512, pro, 4096, 256)
    assert (found.shard, found.dense, found.expert_shard) == (32, 64, 1)


def test_nearest_choices_are_legal() -> None:
    """What a message proposes is accepted."""
    for expert in (3, 5, 6, 7):
        with pytest.raises(ConfigError) as caught:
            layout(8, expert=expert)
        for choice in str(caught.value).rpartition("use ")[2].split(" or "):
            assert layout(8, expert=int(choice)).expert == int(choice)
