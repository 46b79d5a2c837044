"""The page of a plan says what its JSON says, needs nothing but itself, and works in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.browser import probed

from fullweight.cli.main import main
from fullweight.planner.page import beside, beside_in_words, tiles, verdict, write_page

_JOB = ("plan", "flash", "--chip", "ascend-910c", "--chips", "64", "--global-batch", "256", "--count", "2")
_RUN = ("--steps", "500", "--price", "2", "--price-kwh", "0.1")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Two clusters, and a third that the model does not fit."""
    folder = tmp_path_factory.mktemp("plan")
    page, record = folder / "plan.html", folder / "plan.json"
    others = ("--compare", "h200:32", "--compare", "h100:2")
    assert main([*_JOB, *_RUN, *others, "--html", str(page), "--json", str(record)]) == 0
    return page.read_text(encoding="utf-8"), json.loads(record.read_text())


def test_the_page_holds_the_json_and_stands_alone(compared: tuple[str, list[dict[str, Any]]]) -> None:
    page, plans = compared
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", outside)
    assert page.count("plotly.js v") == 1  # the library, once
    held = re.search(r'<script type="application/json" id="plans">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    assert json.loads(held[1]) == plans
    first = plans[0]["layouts"][0]
    assert f"<b>{first['seconds']:.3g} s</b>" in page
    assert f"{first['cost']:,.0f}" in page
    for neighbour in plans[0]["neighbours"]:
        assert neighbour["change"] in page
    assert "No layout fits: the least that was found needs" in page


def test_the_answer_is_the_layout_s(compared: tuple[str, list[dict[str, Any]]]) -> None:
    _, plans = compared
    first = plans[0]["layouts"][0]
    assert verdict(plans[0])[0] == ("unsure" if first["tight"] else "holds")
    assert verdict(plans[2])[0] == "refuted"
    by_title = {title: value for title, value, _ in tiles(plans[0])}
    limit, peak = first["usable_bytes"] / 2**30, max(s["peak"] for s in first["stages"]) / 2**30
    assert by_title["memory of the fullest rank"] == f"{peak:.1f} of {limit:.1f} GiB"
    assert by_title["500 steps"] == f"cost {first['cost']:,.0f}"
    hours, chips = first["seconds"] * 500 / 3600, 64
    kwh = hours * chips * 2 * plans[0]["watts_per_rank"] / 1000
    assert first["cost"] == pytest.approx(hours * chips * 2 + kwh * 0.1)
    low, high = first["cost_between"]
    assert low / first["cost"] == pytest.approx(first["interval_seconds"][0] / first["seconds"])
    assert low < first["cost"] < high
    rows = beside(plans)
    assert f"(× {plans[1]['layouts'][0]['seconds'] / first['seconds']:.2f})" in rows[2][1]
    assert rows[3][-1].startswith("none fits: ")
    words = beside_in_words(plans)
    share = plans[1]["layouts"][0]["kwh_per_step"] / first["kwh_per_step"]
    assert f"{share:.2f} of its energy" in words[0][1]
    assert words[1] == ("refuted", "flash, 2 × h100, 4,096 tokens: no comparison, since no layout fits it.")


def test_what_a_model_is_called_cannot_write_into_the_page(
    compared: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    hostile = [{**compared[1][0], "model": "</script><script>alert(1)</script>"}]
    write_page(hostile, tmp_path / "plan.html")
    assert "<script>alert(1)" not in (tmp_path / "plan.html").read_text(encoding="utf-8")


_PROBE = """
  return plots.map(p => ({run: p.dataset.run, drawn: p.querySelectorAll(".main-svg").length,
    traces: p.data.map(t => ({name: t.name, x: t.x, y: t.y, base: t.base}))}));"""


@pytest.mark.browser
def test_in_a_browser_it_loads_without_errors_and_draws_the_json_s_numbers(
    compared: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    page, plans = compared
    found = probed(page, _PROBE, tmp_path)
    assert all(plot["drawn"] for plot in found)
    assert [plot["run"] for plot in found] == ["all", *["plan0"] * 4, *["plan1"] * 4]
    sides = found[0]["traces"]
    assert sides[0]["y"] == pytest.approx([plan["layouts"][0]["seconds"] for plan in plans[:2]])
    assert sides[1]["y"] == pytest.approx([plan["layouts"][0]["kwh_per_step"] for plan in plans[:2]])
    for number, plan in enumerate(plans[:2]):
        times, memory, passing, effects = (p["traces"] for p in found[1 + 4 * number : 5 + 4 * number])
        first = plan["layouts"][0]
        peaks = next(t for t in memory if t["name"] == "peak")
        assert peaks["x"] == pytest.approx([stage["peak"] / 2**30 for stage in first["stages"]])
        activations = next(t for t in memory if t["name"] == "activations")
        assert activations["x"] == pytest.approx([stage["activations"] / 2**30 for stage in first["stages"]])
        stacked = sum(t["x"][0] for t in times if t["name"] != "step, between")
        assert stacked == pytest.approx(first["seconds"])
        segments = sum(len(t["x"]) for t in passing)
        assert segments == len(plan["timeline"]["segments"])
        forward = next(t for t in passing if t["name"] in ("forward", "passes"))
        starts = [s["start"] for s in plan["timeline"]["segments"] if s["kind"] == forward["name"]]
        assert forward["base"] == pytest.approx(starts)
        assert sorted(effects[0]["x"]) == pytest.approx(sorted(100 * e["change"] for e in plan["sensitivity"]))
