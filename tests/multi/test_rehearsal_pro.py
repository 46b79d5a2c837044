"""A stage of the shipped recipe for V4-Pro on 512 dies, rehearsed from the command line to its end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tests.processes import ROOT, fullweight

from fullweight.train.config import RunConfig

RECIPE = "recipes/v4_pro_sft_910c_512.toml"
RANKS = 512


@pytest.mark.slow
def test_a_stage_of_pro_on_512_ranks(tmp_path: Path) -> None:
    """The last one: main layers, MTP block and head. Counts and bytes are those of the written exchanges."""
    arguments = (RECIPE, "--ranks", RANKS, "--role", "stage 7", "--processes", 1)
    ended = fullweight("rehearse", *arguments, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ended.ok, ended.output  # it fits
    config = RunConfig.from_toml(ROOT / RECIPE)
    architecture, layout = config.model.architecture(), config.layout(RANKS)
    rows = config.train.rows_per_step // layout.data_size
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["num_ranks"], found["rows_per_rank"], found["rows_traced"]) == (RANKS, rows, layout.pipeline + 1)
    (role,) = found["roles"]
    assert role["num_ranks"] == RANKS // layout.pipeline
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for e in role["exchanges"]:
        counts[e["axis"], e["kind"]] += e["count"]
        sizes[e["axis"], e["kind"]] += e["num_bytes"]

    # experts: counts, rows and weights go out and results come back, in forward and again in backward, where
    # gradients of the last three travel the other way
    blocks = config.parallel.stage_layers[-1] + architecture.num_nextn_predict_layers
    assert counts["expert", "all_to_all"] == rows * blocks * (4 + 4 + 3)
    # the gradients of streams and of the next tokens' embeddings go back, in bf16
    tokens = config.data.row_tokens // layout.num_slices
    assert counts["pipeline", "send"] == 2 * rows
    width = architecture.hidden_size
    assert sizes["pipeline", "send"] == rows * tokens * (architecture.hc_mult + 1) * width * 2
    # experts lie whole on their rank, in fp32; what else there is is cut over the stage's ranks
    local = architecture.n_routed_experts // layout.expert
    experts = blocks * local * 3 * width * architecture.moe_intermediate_size
    rest = role["num_parameters"] - experts
    assert 0 < rest < 0.1 * experts
    assert role["peak_by_category"]["gradients"] == 4 * experts, "the others' are not reduced before the end"
    assert "stage 7" in (tmp_path / "r.html").read_text()


def test_a_role_that_there_is_not_is_told() -> None:
    ended = fullweight("rehearse", RECIPE, "--ranks", RANKS, "--role", "stage 8")
    assert ended.statuses == (1,)
    assert "this layout has no role 'stage 8'; did you mean" in ended.output
