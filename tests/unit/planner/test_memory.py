"""The planner's memory beside recorded rehearsals.

`rehearsed.json`, which `benchmarks/rehearsals.py` writes, has each one's command and what it said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import dense, reference
from fullweight.ops.ascend import attention as lists
from fullweight.ops.cpu import attention, experts, loss
from fullweight.optim import buckets, muon
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner import muon as planned_muon
from fullweight.planner.chips import chip
from fullweight.planner.elements import Around, block_pass
from fullweight.planner.memory import MemoryModel, Setting, StageMemory, memory_of, num_groups
from fullweight.planner.operations import SETS, rounded_rows
from fullweight.planner.operations import attention as planned_attention
from fullweight.planner.operations import experts as planned_experts
from fullweight.planner.operations import reference as planned_reference
from fullweight.planner.operations.ascend import attention as ascend_attention
from fullweight.planner.operations.cuda import attention as cuda_attention
from fullweight.planner.passes import Row
from fullweight.planner.recorded import planned
from fullweight.planner.sharding import NOTHING, unit_of
from fullweight.planner.shards import block_shapes, held, root_shapes
from fullweight.planner.tape import CATEGORIES
from fullweight.rehearse.routing import Routing
from fullweight.rehearse.run import rehearse
from fullweight.train.config import RunConfig

RECORDS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("rehearsed.json").read_text())
BOUND = 0.03  # of each category and of the peak
# A category of less than this share of the peak is held to this share of it: tiny layouts have some of a few
# kilobytes, in which the counters and flags that the planner leaves out weigh.
FLOOR = 0.001


def compare(found: StageMemory, most_by_category: dict[str, int], peak_bytes: int) -> None:
    """Every category and the peak."""
    for name, said in {**most_by_category, "peak": peak_bytes}.items():
        assert getattr(found, name) == pytest.approx(said, rel=BOUND, abs=FLOOR * peak_bytes), name


def test_recordings_are_of_every_kind() -> None:
    """Layouts of tiny, Flash and Pro with every axis, schedule and policy."""
    known = [r for r in RECORDS if not r["held_out"] and r["operations"] == "cpu"]
    assert {r["model"]["preset"] for r in known} == {"tiny", "flash", "pro"}
    assert len(known) >= 24
    for operations in ("ascend", "cuda"):
        own = [r for r in RECORDS if r["operations"] == operations]
        assert {"tiny", "flash", "pro"} <= {r["model"]["preset"] for r in own}
        assert {r["parallel"].get("recompute", "none") for r in own} == {"none", "selective", "full"}
        for axis in ("context", "tensor", "expert", "pipeline"):
            assert any(r["parallel"].get(axis, 1) > 1 for r in own)
    parallel = [r["parallel"] for r in RECORDS]
    assert {p.get("recompute", "none") for p in parallel} == {"none", "selective", "full"}
    assert {p.get("schedule", "1f1b") for p in parallel} == {"1f1b", "interleaved", "zero_bubble", "zbv"}
    for setting in ("replicate", "context", "tensor", "expert", "reshard_after", "offload_optimizer"):
        assert any(setting in p for p in parallel)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["name"])
def test_every_category_of_every_recorded_role(record: dict[str, Any]) -> None:
    stages = planned(record)
    assert record["roles"]
    for role in record["roles"]:
        compare(stages[role["pipeline"]], role["most_by_category"], role["peak_bytes"])


def test_sizes_are_those_of_the_operations() -> None:
    """The planner imports no torch, so what the operations are cut into is written down there too."""
    assert planned_attention.BLOCK == attention.BLOCK
    assert planned_attention.CHUNK == attention.CHUNK
    assert planned_attention.SCORES == attention.SCORES
    assert planned_experts.GROUP == experts.GROUP
    assert planned_experts.LOGITS == loss.LOGITS
    assert planned_experts.ROWS == loss.ROWS
    assert planned_reference.QUERIES == reference.QUERY_CHUNK
    assert planned_reference.LOGITS == reference.TOKEN_CHUNK
    assert ascend_attention.PLACES == lists.STEP
    assert ascend_attention.ROTARY == lists.ROTARY_DIM
    assert cuda_attention.BLOCK == dense.BLOCK
    assert cuda_attention.MOST_SCORES == dense.MOST_SCORES
    assert planned_muon.CHUNK_ENTRIES == muon.CHUNK_ENTRIES
    assert planned_muon.BUCKET_BYTES == buckets.BUCKET_BYTES
    assert len(muon.COEFFICIENTS) == planned_muon.ITERATIONS
    for rows in range(0, 2000, 7):
        assert rounded_rows(rows) == experts.rounded_rows(rows)


def test_shapes_are_those_of_the_model() -> None:
    config = DeepSeekV4Config.preset("tiny")
    model = DeepSeekV4(config)
    shapes = dict(root_shapes(config, first=True, last=True))
    for layer in range(config.num_hidden_layers + 1):
        shapes |= dict(block_shapes(config, layer))
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("operations", SETS)
def test_a_block_gives_back_what_it_took_but_the_gradients(layer: int, policy: str, operations: str) -> None:
    """Forward and backward: what is left is every matrix's gradient once, and the gradient of the streams."""
    config = DeepSeekV4Config.preset("tiny")
    row = Row(256, Layout(), operations=operations)
    around = Around(policy, hooked=False, first=True, late=False, unit=NOTHING, root=frozenset(), uses=2)
    made = block_pass(config, row, layer, around)
    both = [f + b for f, b in zip(made.forward.net, made.backward.net, strict=True)]
    left = dict(zip(CATEGORIES, both, strict=True))
    shapes = [shape for _, shape in block_shapes(config, layer) if len(shape) > 1]
    numbers = sum(int(a) * int(b) * (int(c[0]) if c else 1) for a, b, *c in shapes)
    norms = left["gradients"] // 4 - numbers
    assert 0 <= norms < 500  # vectors: norms' weights
    assert left["activations"] == 0
    assert left["communication"] == left["gathered"] == 0
    assert left["temporaries"] == 0  # the gradient that came in has gone, that of the input is as large


def test_uneven_experts_are_cut_by_rows_with_adamw_alone() -> None:
    """Three experts on sixteen ranks: 1/16 of all three, or, between matrices, one whole expert."""
    config = DeepSeekV4Config.preset("pro")
    layout = Layout(shard=2048, expert=128)
    name, shape = next(item for item in block_shapes(config, 5) if item[0].endswith("experts.down"))
    by_rows = held(config, layout, iter([(name, shape)]), adamw=True)[0]
    between = held(config, layout, iter([(name, shape)]), adamw=False)[0]
    assert (by_rows.here, between.here) == (3 * 7168 * 3072 // 16, 7168 * 3072)


def test_small_matrices_are_gathered_as_large_as_their_ranks_are_many() -> None:
    """24 rows over 2,048 ranks: each gives a row, most of them empty ones."""
    config = DeepSeekV4Config.preset("pro")
    layout = Layout(shard=2048, expert=128)
    shapes = ((name, shape) for name, shape in block_shapes(config, 5) if name.endswith("hc_attn_fn"))
    (group,) = unit_of(held(config, layout, shapes, adamw=True), dealt=True).groups
    assert group.whole == 4 * 2048 * 4 * 7168
    assert group.exact == 4 * 24 * 4 * 7168


def test_more_micro_batches_than_the_schedule_holds_change_nothing() -> None:
    config = DeepSeekV4Config.preset("flash")
    parallel = ParallelConfig(pipeline=4, expert=32, recompute="full")
    layout = parallel.layout(128, config, 4096, 32 * 16)
    model = MemoryModel(config)
    few, many = (list(model.of(parallel, layout, Setting(4096, count))) for count in (5, 16))
    assert few == many


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (
            2,
            (
                "ops.default='cuda'",
                "train.rows_per_step=6",
                "parallel.pipeline=2",
                "parallel.recompute='selective'",
            ),
        ),
        (
            4,
            (
                "ops.default='cuda'",
                "data.row_tokens=1024",
                "train.rows_per_step=2",
                "parallel.tensor=2",
                "parallel.expert=4",
            ),
        ),
        (4, ("train.rows_per_step=4", "parallel.expert=2")),
        (8, ("train.rows_per_step=8", "parallel.replicate=2", "parallel.tensor=2", "parallel.expert=2")),
        (4, ("train.rows_per_step=8", "parallel.pipeline=2", "parallel.recompute='full'")),
        (
            2,
            (
                "data.row_tokens=512",
                "train.rows_per_step=2",
                "parallel.context=2",
                "parallel.recompute='selective'",
            ),
        ),
        (
            2,
            (
                "train.rows_per_step=6",
                "parallel.pipeline=2",
                "parallel.virtual_stages=2",
                "parallel.schedule='zbv'",
            ),
        ),
    ],
    ids=["cuda-pipeline", "cuda-tensor", "fsdp-experts", "replicas", "pipeline", "context", "v-shaped"],
)
def test_rehearsals_of_now(ranks: int, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of layouts that are traced here, not recorded."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = Path(__file__).parents[3]
    config = RunConfig.from_toml(root / "recipes" / "tiny_smoke.toml", ["optimizer.name='adamw'", *settings])
    rehearsal = rehearse(config, "tiny", ranks, chip("h100"), Routing())
    layout = config.layout(ranks)
    operations = "cuda" if config.ops.default == "cuda" else "cpu"
    rows = config.train.rows_per_step // layout.data_size
    setting = Setting(config.data.row_tokens, rows, "adamw", operations=operations)
    stages = memory_of(config.model.architecture(), config.parallel, layout, setting)
    for role in rehearsal.roles:
        assert role.num_groups == num_groups(layout)
        compare(stages[role.coordinates["pipeline"]], role.most_by_category, role.peak_bytes)
