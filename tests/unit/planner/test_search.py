"""A plan keeps what must hold: what fits is legal, more memory never unfits, and reasons are in words."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processes import fullweight

from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.models.deepseek_v4.flops import training_flops
from fullweight.parallel.config import ParallelConfig
from fullweight.planner import explain, space
from fullweight.planner.basis import interval, terms
from fullweight.planner.chips import chip
from fullweight.planner.explain import more_memory, neighbours, reliability, sensitivity, unknowns
from fullweight.planner.memory import Setting
from fullweight.planner.recipe import recipe_text
from fullweight.planner.screen import CLOSE
from fullweight.planner.search import Candidate, Planner, Request, easy_batches, mfu, model_flops
from fullweight.train.config import RunConfig

FLASH = DeepSeekV4Config.preset("flash")


def request(ranks: int = 128, **changes: object) -> Request:
    base = Request("flash", FLASH, chip("ascend-910c"), ranks, 4096, 256)
    return replace(base, **changes)  # type: ignore[arg-type]


PLANNER = Planner(request())
PLAN = PLANNER.search(3)


def test_what_is_proposed_is_legal_fits_and_is_in_order() -> None:
    assert len(PLAN.best) == 3
    seconds = [candidate.seconds for candidate in PLAN.best]
    assert seconds == sorted(seconds)
    for candidate in PLAN.best:
        rows = 256 // candidate.documents
        assert candidate.layout == candidate.parallel.layout(128, FLASH, 4096 * candidate.documents, rows)
        assert max(stage.peak for stage in candidate.memory) <= candidate.usable
        assert 0 < mfu(PLANNER.request, candidate.seconds) < 1


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([40.0, 59.6, 80.0, 140.0]), st.sampled_from([1.1, 1.5, 2.0]))
def test_more_memory_never_unfits(memory: float, factor: float) -> None:
    """A layout that fits a chip fits one with more memory, so the best step is no slower."""
    small = chip("ascend-910c").model_copy(update={"memory_gb": memory})
    large = chip("ascend-910c").model_copy(update={"memory_gb": memory * factor})
    parallel = ParallelConfig(tensor=2, expert=64, recompute="full", offload_optimizer=True)
    fits = [Planner(request(chip=c)).evaluated(parallel).fits for c in (small, large)]
    assert fits[1] or not fits[0]


def test_the_best_with_more_memory_is_no_slower() -> None:
    large = chip("ascend-910c").model_copy(update={"memory_gb": 119.2})
    assert Planner(request(chip=large)).search(1).best[0].seconds <= PLAN.best[0].seconds


def everything(planner: Planner) -> Iterator[Candidate]:
    """Every layout of the space that is legal, one by one."""
    request = planner.request
    for shape in space.shapes(request.ranks, request.config, request.sequence):
        for schedule in space.schedules(shape.pipeline, request.config.num_hidden_layers):
            for parallel in space.policies(space.parallel(shape, schedule)):
                try:
                    yield planner.evaluated(parallel, shape.documents)
                except ConfigError:
                    continue


def test_the_search_finds_what_trying_everything_finds() -> None:
    """The queue gives the whole space in order, whatever fits; stages cut by hand come beside."""
    device = chip("h100").model_copy(update={"reserved_gb": 0.0, "buffer_gb_per_group": 0.0})
    base = Request("small", DeepSeekV4Config.preset("small"), device, 4, 4096, 16)
    tried = sorted(everything(Planner(base)), key=lambda c: c.seconds)
    peaks = sorted(c.fullest.peak for c in tried)
    for place in (20, len(peaks) // 3, -1):
        limit = device.model_copy(update={"memory_gb": (peaks[place] + 1024) / 2**30})
        found = Planner(replace(base, chip=limit)).search(20)
        by_cost = [c.seconds for c in found.best if not c.parallel.stage_layers]
        assert len(by_cost) >= 5
        assert by_cost == [c.seconds for c in tried if c.fullest.peak <= peaks[place]][: len(by_cost)]
        assert found.num_asked < len(tried)


def test_no_layout_of_a_shape_beats_its_bound() -> None:
    planner = Planner(request(ranks=64, global_batch=256))
    for shape in list(space.shapes(64, FLASH, 4096))[::23]:
        try:
            layout = planner.layout(space.parallel(shape), shape.documents)
        except ConfigError:
            continue
        bound = planner.bound(shape, layout)
        for schedule in space.schedules(shape.pipeline, FLASH.num_hidden_layers):
            if space.legal(schedule, shape.pipeline, 256 // shape.documents // layout.data_size):
                for parallel in space.policies(space.parallel(shape, schedule)):
                    assert planner.timed(parallel, layout, shape.documents).seconds >= bound * (1 - 1e-12)


@pytest.mark.parametrize("device", ["ascend-910c", "h200"])
@pytest.mark.parametrize("documents", [1, 2])
def test_a_quick_look_drops_nothing_that_fits(device: str, documents: int) -> None:
    """It never says more than `CLOSE` times what a replay does, of any rank, whatever is recomputed."""
    planner = Planner(request(chip=chip(device)))
    bases = [
        ParallelConfig(expert=32, tensor=2),
        ParallelConfig(pipeline=4, expert=32),
        ParallelConfig(pipeline=2, expert=64, schedule="zero_bubble", virtual_stages=2),
    ]
    for base in bases:
        for parallel in space.policies(base)[:3]:
            layout = planner.layout(parallel, documents)
            candidate = planner.timed(parallel, layout, documents)
            looks, counts = list(planner.screened(candidate)), list(planner.ranks(candidate))
            for look, count in zip(looks, counts, strict=True):
                assert look.peak <= CLOSE * count.peak
            if parallel.recompute != "full":  # and little less, or a search would replay what cannot fit
                assert max(s.peak for s in looks) > 0.75 * max(s.peak for s in counts)


def test_the_last_policy_needs_least() -> None:
    """What lets a whole shape be dropped by one question."""
    for pipeline in (1, 4):
        base = ParallelConfig(pipeline=pipeline, expert=16)
        peaks = [PLANNER.evaluated(parallel).fullest.peak for parallel in space.policies(base)]
        assert min(peaks) == peaks[-1]


def test_a_layer_moves_to_the_emptiest_rank() -> None:
    base = ParallelConfig(pipeline=3)
    moved = space.with_a_layer_moved(base, (14, 14, 15), 0, 2)
    assert moved is not None
    assert moved.stage_layers == (13, 14, 16)
    assert space.with_a_layer_moved(base, (1, 21, 21), 0, 2) is None


def test_stages_are_cut_by_hand_where_a_rank_is_too_full() -> None:
    """Pro on 160 chips fits no cut by cost with this layout, and one with two layers moved."""
    pro = DeepSeekV4Config.preset("pro")
    planner = Planner(Request("pro", pro, chip("ascend-910c"), 320, 4096, 1280))
    best = planner.search(1).best[0]
    assert best.parallel.stage_layers
    assert sum(best.parallel.stage_layers) == pro.num_hidden_layers
    assert not planner.evaluated(best.parallel.model_copy(update={"stage_layers": ()})).fits
    config = RunConfig.resolve(tomllib.loads(recipe_text(planner.request, best)), "a recipe")
    assert config.parallel == best.parallel


def test_documents_in_a_row_keep_the_tokens_of_a_step() -> None:
    one, two = (PLANNER.evaluated(ParallelConfig(tensor=2, expert=64), number) for number in (1, 2))
    assert one.job.tokens == two.job.tokens
    assert two.job.micro_batches == one.job.micro_batches / 2
    assert two.time.launch < one.time.launch
    assert two.fullest.activations > 1.5 * one.fullest.activations
    config = tomllib.loads(recipe_text(PLANNER.request, two))
    assert config["data"]["row_tokens"] * config["train"]["rows_per_step"] == 4096 * 256
    with pytest.raises(ConfigError, match="do not fill rows of 3"):
        PLANNER.evaluated(ParallelConfig(), 3)


def test_attention_is_by_document() -> None:
    """A row of 512 documents of 8 tokens: no entry of HCA, two of CSA, and keys counted one by one."""
    base = ParallelConfig(expert=64, recompute="full")
    whole = PLANNER.evaluated(base)
    planner = Planner(request(lengths=(8,)))
    short = planner.evaluated(base)
    pairs = sum(min(t + 1, FLASH.sliding_window) for t in range(8))
    entries = sum(min((t + 1) // 4, FLASH.index_topk) for t in range(8))
    heads, csa = FLASH.num_attention_heads * FLASH.head_dim, FLASH.count_layers(LayerKind.CSA)
    keys = 4 * heads * (FLASH.num_hidden_layers * pairs + csa * entries)
    scores = csa * 2 * FLASH.index_n_heads * FLASH.index_head_dim * sum((t + 1) // 4 for t in range(8))
    assert planner.work.attention_flops == pytest.approx((keys + scores) / 8)
    masked = 4 * heads * csa * (8 * 2 - entries)  # each query has the two slots that the last one fills
    assert planner.work.attention_made == pytest.approx((keys + scores + masked) / 8)
    # the MTP block's window is counted with its products
    assert short.job.work.gemm_flops == pytest.approx(whole.job.work.gemm_flops, rel=0.01)
    assert short.job.work.expert_flops == whole.job.work.expert_flops
    assert short.time.compute < whole.time.compute
    assert short.memory == whole.memory  # a row is counted as one document, which sees the most


def test_a_mix_of_documents_counts_as_the_ledger_does() -> None:
    """MFU's FLOPs are those of the lengths together, by token, whatever their order."""
    lengths = (100, 900, 3096)
    mixed = request(lengths=lengths)
    assert model_flops(mixed) == pytest.approx(256 * training_flops(FLASH, lengths).total, rel=1e-12)
    assert model_flops(request(lengths=lengths[::-1])) == model_flops(mixed)
    assert model_flops(request(lengths=(4096,))) == model_flops(request())


def test_a_capacity_bounds_what_experts_take() -> None:
    """With twice the mean load, a factor of 1.25 leaves 1.25 of it; one above the load changes nothing."""
    skewed = Planner(request(skew=2.0))
    base = ParallelConfig(expert=64, recompute="none", offload_optimizer=True)
    free = skewed.evaluated(base)
    bounded, loose = (
        skewed.evaluated(base.model_copy(update={"expert_capacity_factor": factor})) for factor in (1.25, 3.0)
    )
    assert loose.seconds == free.seconds
    assert loose.memory == free.memory
    assert bounded.job.expert_load == 1.25
    work = free.job.work.expert_flops
    assert work == bounded.job.work.expert_flops
    assert bounded.time.expert == pytest.approx(free.time.expert * 1.25 / 2.0)
    assert bounded.fullest.activations < free.fullest.activations
    planned = Planner(request(skew=2.0, capacity=1.25)).search(1).best[0]
    assert planned.parallel.expert_capacity_factor == 1.25
    assert tomllib.loads(recipe_text(skewed.request, planned))["parallel"]["expert_capacity_factor"] == 1.25


def test_every_part_says_what_it_rests_on() -> None:
    """Intervals hold the value; what no run on this make shows is UNKNOWN and within a factor of two."""
    best = PLAN.best[0]
    found = {term.name: term for term in terms(best.job, best.time)}
    assert sum(term.seconds for term in found.values()) == pytest.approx(best.seconds)
    assert all(term.low <= term.seconds <= term.high for term in found.values())
    assert found["compute"].status == "thin"
    assert "1 on Ascend" in found["compute"].basis
    assert found["data"].status == "UNKNOWN"
    assert found["data"].high == 2 * found["data"].seconds
    assert found["expert load"].high > 0
    low, high = interval(best.job, best.time)
    assert low < best.seconds < high
    measured = Planner(request(skew=1.2)).evaluated(best.parallel, best.documents)
    assert "expert load" not in {term.name for term in terms(measured.job, measured.time)}
    gpu = Planner(request(chip=chip("h100"), ranks=64)).evaluated(ParallelConfig(expert=8))
    assert {term.name: term.status for term in terms(gpu.job, gpu.time)}["compute"] == "fitted"


def test_neighbours_say_why_not() -> None:
    found = {n.change: n.reason for n in neighbours(PLANNER, PLAN.best[0])}
    assert any("GiB; the most are" in reason for reason in found.values())
    assert any("slower" in reason for reason in found.values())
    assert len(found) >= 6
    assert PLAN.best[0].parallel.expert == 128  # of 128 ranks, so experts follow where a stage has fewer
    assert "must divide" not in found["pipeline 2, expert 64"]


def test_what_would_fit_does() -> None:
    """Single changes of a layout that does not fit are offered where they fit, and not where they do not."""
    best = PLAN.best[0]
    full = best.parallel.model_copy(update={"expert": 16, "recompute": "full", "offload_optimizer": False})
    found = PLANNER.evaluated(full, best.documents)
    assert not found.fits
    offers = list(explain._fitting(PLANNER, best, found))
    wider = PLANNER.evaluated(full.model_copy(update={"expert": 32}), best.documents)
    assert ("expert 32" in offers) == wider.fits
    hosted = PLANNER.evaluated(full.model_copy(update={"offload_optimizer": True}), best.documents)
    assert ("moments in host memory" in offers) == hosted.fits


def test_more_memory_lets_in_what_is_faster() -> None:
    """The effect is the barred neighbour's own time, and what it lacks its own bytes."""
    best = PLAN.best[0]
    found = {n.change: n for n in neighbours(PLANNER, best)}
    for effect in more_memory(best, list(found.values())):
        one = found[effect.what.rpartition(", for ")[2]]
        assert one.seconds is not None
        assert one.peak_bytes is not None
        assert one.usable_bytes is not None
        assert one.kind == "does not fit"
        assert effect.change == pytest.approx(one.seconds / best.seconds - 1)
        assert effect.change < 0
        assert effect.what.startswith(f"{(one.peak_bytes - one.usable_bytes) / 2**30:.1f} GiB more a rank")


def test_effects_have_the_sign_that_they_must() -> None:
    effects = {e.what: e.change for e in sensitivity(PLAN.best[0])}
    assert effects["expert load 1.5 times the mean"] > 0
    assert all(change <= 1e-12 for what, change in effects.items() if "expert load" not in what)


def test_each_chip_is_counted_with_its_makers_operations() -> None:
    """What does not fit with CUDA's operations is not planned for a GPU, whatever a CPU's would take."""
    assert {chip(name).operations for name in ("ascend-910c", "ascend-910b1")} == {"ascend"}
    assert {chip(name).operations for name in ("h100", "h200", "gb200")} == {"cuda"}
    gpu = Planner(request(chip=chip("h200"), ranks=64))
    parallel = ParallelConfig(expert=64, recompute="selective")
    counted = gpu.evaluated(parallel, 2)
    layout = gpu.layout(parallel, 2)
    setting = Setting(2 * 4096, counted.job.micro_batches)
    (of_cpu,) = gpu.memory.of(parallel, layout, setting)
    (of_cuda,) = gpu.memory.of(parallel, layout, replace(setting, operations="cuda"))
    assert counted.fullest == of_cuda
    assert of_cpu.peak < counted.usable < of_cuda.peak
    assert not counted.fits


def test_what_is_tight_is_told_and_not_chosen() -> None:
    """Less room than what the count may be off by, 1 %."""
    first, second = PLAN.best[:2]
    full = replace(first, usable=int(first.fullest.peak * 1.005))
    roomy = replace(second, usable=int(second.fullest.peak * 1.02))
    assert full.fits
    assert full.tight
    assert full.most_bytes == pytest.approx(full.fullest.peak * 1.01, rel=1e-6)
    assert not roomy.tight
    assert replace(PLAN, best=(full, roomy)).chosen is roomy
    assert replace(PLAN, best=(full, full)).chosen is full


def test_reliability_by_hand() -> None:
    """128 ranks at 1e-4 an hour: 78.125 h between; checkpoints of 60 s every sqrt(2 x 60 x 281250) s."""
    found = reliability(PLAN.best[0], 1e-4, 60.0, 600.0)
    assert found.hours_between == pytest.approx(78.125)
    assert found.checkpoint_every_seconds == pytest.approx(5809.475, rel=1e-6)
    assert found.effective_share == pytest.approx(1 - 60 / 5809.475 - (5809.475 / 2 + 600) / 281250, rel=1e-6)
    assert not found.replica_recovery


def test_what_is_unknown_is_told() -> None:
    assert any("expert load" in line for line in unknowns(PLAN.best[0]))
    assert any("assumption" in line for line in unknowns(PLAN.best[0]))


def test_the_recipe_is_one_that_training_reads(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_text(PLANNER.request, PLAN.best[0]))
    config = RunConfig.from_toml(file, [])
    assert config.layout(128) == PLAN.best[0].layout
    assert config.parallel == PLAN.best[0].parallel
    assert config.train.rows_per_step * config.data.row_tokens == 256 * 4096


@pytest.mark.slow
def test_a_planned_recipe_is_one_that_trains(tmp_path: Path) -> None:
    """From `--emit` to steps, with a file of data put where the recipe says."""
    recipe, data = tmp_path / "recipe.toml", tmp_path / "sft.jsonl"
    base = ("plan", "tiny", "--chip", "h100", "--chips", "1", "--sequence", "256", "--global-batch", "8")
    planned = fullweight(*base, "--emit", recipe)
    assert planned.ok, planned.output
    turns = ({"role": "user", "content": "a number?"}, {"role": "assistant", "content": "two"})
    lines = [json.dumps({"messages": [turns[0], turns[1] | {"content": f"it is {n}"}]}) for n in range(400)]
    data.write_text("\n".join(lines) + "\n")
    settings = [f"data.sources=[{{kind='file', path='{data}'}}]", "train.num_steps=2", "schedule.warmup_steps=0"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    trained = fullweight("train", recipe, "--output", tmp_path / "run", "--set", "train.device=cpu", *chosen)
    assert trained.ok, trained.output


@pytest.mark.slow
def test_a_planned_recipe_is_one_that_rehearses(tmp_path: Path) -> None:
    """From `--emit` to a rehearsal, with nothing between."""
    recipe = tmp_path / "recipe.toml"
    base = ("plan", "tiny", "--chip", "h100", "--chips", "2", "--sequence", "256", "--global-batch", "8")
    planned = fullweight(*base, "--emit", recipe)
    assert planned.ok, planned.output
    rehearsed = fullweight("rehearse", recipe, "--ranks", "2", "--chip", "h100", "--processes", "1")
    assert rehearsed.ok, rehearsed.output


def test_a_batch_that_nothing_divides_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--global-batch 1021 is not divisible .* use 1020 or 1022|use "):
        Planner(request(ranks=65536, global_batch=1021)).search()


def test_counts_that_no_axis_divides_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 14 ranks .* use 4 chips or 8 chips"):
        Planner(request(ranks=14)).search()
    assert easy_batches(request(global_batch=1021)) == (1008, 1024)
    assert easy_batches(request(global_batch=1024)) == ()


def test_the_command_plans_emits_and_records(tmp_path: Path) -> None:
    recipe, record = tmp_path / "recipe.toml", tmp_path / "plan.json"
    result = fullweight(
        *("plan", "deepseek-v4-flash", "--chip", "ascend-910c", "--chips", "64", "--global-batch", "256"),
        *("--steps", "100", "--price", "2", "--emit", recipe, "--json", record),
        *("--optimizer", "muon", "--capacity-factor", "1.5", "--document-lengths", "300,1500"),
    )
    assert result.ok
    assert "128 dies of ascend-910c" in result.output
    assert "why not" in result.output
    assert recipe.is_file()
    (plan,) = json.loads(record.read_text())
    assert plan["layouts"][0]["cost"] > 0
    assert plan["layouts"][0]["seconds_by_part"]["newton_schulz"] > 0
    assert plan["document_lengths"] == [300, 1500]
    assert tomllib.loads(recipe.read_text())["parallel"]["expert_capacity_factor"] == 1.5
    assert plan["reliability"]["replica_recovery"] is False


def test_mistakes_are_one_message() -> None:
    base = ("plan", "flash", "--chips", "64")
    result = fullweight(*base, "--chip", "ascend-910")
    assert not result.ok
    assert "unknown chip 'ascend-910'; did you mean" in result.output
    result = fullweight(*base, "--chip", "h100", "--document-lengths", "100,9000")
    assert "--document-lengths '100,9000': expected whole numbers from 1 to the row's 4096" in result.output
    result = fullweight(*base, "--chip", "h100", "--compare", "h200")
    assert "expected a chip and a number of chips" in result.output


def test_a_model_of_another_family_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    sizes = '"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256'
    file.write_text(f'{{"model_type": "llama", {sizes}, "vocab_size": 1000}}')
    result = fullweight("plan", file, "--chip", "h100", "--chips", "8")
    assert not result.ok
    assert (
        "describes model_type 'llama'; expected 'deepseek_v4': layouts and memory are planned for" in result.output
    )
    file.write_text('{"model_type": "mamba"}')
    result = fullweight("plan", file, "--chip", "h100", "--chips", "8")
    assert "describes model_type 'mamba'; expected 'deepseek_v4'" in result.output


def test_clusters_side_by_side() -> None:
    result = fullweight(
        *("plan", "flash", "--chip", "ascend-910c", "--chips", "64", "--global-batch", "256"),
        *("--compare", "nvidia-h100:128"),
    )
    assert result.ok
    assert "kWh a step" in result.output
    assert "h100 x128" in result.output
