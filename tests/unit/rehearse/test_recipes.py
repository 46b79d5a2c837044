"""The recipes for accelerators resolve to their layouts, and a small rehearsal runs from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.processes import ROOT, fullweight

from fullweight.parallel.config import Layout
from fullweight.rehearse.run import roles_of
from fullweight.train.config import RunConfig

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("v4_*.toml"))
CHIPS = {"910c": "", "h100": " --chip h100", "h200": " --chip h200"}


def resolved(name: str) -> RunConfig:
    return RunConfig.from_toml(ROOT / "recipes" / f"{name}.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_accelerators_resolves(name: str) -> None:
    """Its name ends with chip and ranks, the layout takes so many, and one command in its text rehearses it."""
    *_, chip, ranks = name.split("_")
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    assert resolved(name).layout(int(ranks)).world == int(ranks)
    assert f"fullweight rehearse recipes/{name}.toml --ranks {ranks}{CHIPS[chip]}" in text


def test_the_jobs_that_are_promised_are_here() -> None:
    """Flash on 64 chips; Pro continued and tuned on 256 and 512 chips and on 1,024, for each chip."""
    pro = {(job, size) for job in ("cpt", "sft") for size in (256, 512, 1024)}
    promised = {f"v4_pro_{job}_{chip}_{size}" for job, size in pro for chip in ("h100", "h200")}
    promised |= {f"v4_pro_{job}_910c_{2 * size}" for job, size in pro}
    promised |= {"v4_flash_sft_910c_128", "v4_flash_sft_h100_64", "v4_flash_sft_h200_64"}
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if "_cpt_" in name])
def test_continued_training_takes_the_memory_of_tuning(name: str) -> None:
    """Same model, rows, layout and optimiser as the twin that was rehearsed: shapes are equal, so memory is."""
    cpt, sft = resolved(name), resolved(name.replace("_cpt_", "_sft_"))
    assert (cpt.model, cpt.parallel, cpt.optimizer.name) == (sft.model, sft.parallel, sft.optimizer.name)
    assert (cpt.data.row_tokens, cpt.train.rows_per_step) == (sft.data.row_tokens, sft.train.rows_per_step)


def test_roles_cover_every_rank() -> None:
    """Each rank has one role, whatever the axes."""
    for layout in (
        Layout(shard=4),
        Layout(pipeline=2, shard=2, tensor=2),
        Layout(replicate=2, context=4, tensor=2),
    ):
        roles = roles_of(layout)
        assert sum(role.num_ranks for role in roles) == layout.world
        assert len({role.rank for role in roles}) == len(roles)


def test_the_command_tells_what_fits(tmp_path: Path) -> None:
    """Table, JSON and page of a small layout; exit status 0 when it fits."""
    arguments = ["rehearse", "recipes/tiny_smoke.toml", "--ranks", "4", "--processes", "1"]
    arguments += ["--set", "parallel.pipeline=2", "--set", "parallel.expert=2", "--set", "train.rows_per_step=8"]
    ended = fullweight(*arguments, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ended.ok, ended.output
    assert "stage 0" in ended.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["all_fit"]
    assert [role["num_ranks"] for role in found["roles"]] == [2, 2]
    for role in found["roles"]:
        assert sum(role["peak_by_category"].values()) == role["peak_bytes"]
        assert {e["axis"] for e in role["exchanges"]} >= {"dense", "expert", "pipeline"}
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert "A projection" in page


def test_what_does_not_fit_is_told_by_the_status() -> None:
    """Two blocks of Flash with all their experts take 200 GB with their moments: more than a die has."""
    settings = ["model.preset=flash", "model.changes={num_hidden_layers=1, compress_ratios=[128, 0]}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    ended = fullweight("rehearse", "recipes/tiny_smoke.toml", "--ranks", "1", *arguments)
    assert ended.statuses == (2,), ended.output
    assert "Traceback" not in ended.output
    unknown = fullweight("rehearse", "recipes/tiny_smoke.toml", "--ranks", "1", "--chip", "b301", *arguments)
    assert unknown.statuses == (1,)
    assert "unknown chip 'b301'" in unknown.output
