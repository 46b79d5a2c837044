"""`fullweight report`: the page says what the ledger says, needs nothing but itself, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.browser import probed
from tests.processes import fullweight

from fullweight.cli.main import main
from fullweight.evidence.ledger import read_all
from fullweight.report.record import record

_SHORT = ("--set", "checkpoint.every=2", "--set", "eval.every=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, of which the last four were done twice: an interruption is in the ledger."""
    folder = tmp_path_factory.mktemp("report") / "run"
    done = fullweight(
        "train", "recipes/tiny_smoke.toml", "--output", folder, "--set", "train.num_steps=6", *_SHORT
    )
    assert done.ok, done.output
    shutil.rmtree(folder / "checkpoints" / "step-6")
    done = fullweight("resume", folder, "--on-corrupt", "previous", "--set", "train.num_steps=8")
    assert done.ok, done.output
    return folder


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    done = fullweight("seal", run, "--out", run.parent / "bundle", "--unsigned")
    assert done.ok, done.output
    return run.parent / "bundle"


@pytest.fixture(scope="module")
def page(run: Path, bundle: Path) -> str:
    """The page of the bundle and of the run folder, side by side."""
    out = run.parent / "page.html"
    assert main(["report", str(bundle), str(run), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_every_number_is_its_ledger_lines(run: Path) -> None:
    found = record(run)
    lines = {line.number: line for line in read_all(run / "ledger.jsonl")}
    steps = found["steps"]
    assert steps["step"] == list(range(1, 9))
    for place, number in enumerate(steps["line"]):
        entry = lines[number].entry
        assert not lines[number].superseded
        assert entry["step"] == steps["step"][place]
        assert entry["loss"]["lm"] == steps["loss"]["lm"][place]
        assert entry["grad_norm"] == steps["grad_norm"][place]
        assert entry["tokens_per_second"] == pytest.approx(steps["tokens_per_second"][place])
        assert entry["seconds"]["forward"] == steps["seconds"]["forward"][place]
        assert entry["memory"]["resident_bytes"] == steps["memory"]["resident_bytes"][place]
    assert [lines[n].entry["kind"] for n in (e["line"] for e in found["evaluations"])] == ["eval"] * 4
    gone = found["superseded"]
    assert gone["step"] == [5, 6]
    assert all(lines[n].superseded for n in gone["line"])
    assert [s["what"] for s in found["segments"]] == ["start", "resume"]
    assert found["segments"][1]["step"] == 4
    assert sum(cell["elements"] for cell in found["coverage"]["cells"]) == found["coverage"]["parameters"]["total"]


def test_the_page_stands_alone(page: str) -> None:
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", outside)
    assert page.count("plotly.js v") == 1  # the library, once
    assert "resume, line" in page
    assert "holds" in page
    assert "not checkable" in page
    assert "1 interruption(s), 2 steps done twice" in page
    assert "unknown: power is unknown" in page


def test_json_is_what_the_page_is_made_from(run: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "page.html", tmp_path / "data.json"
    assert main(["report", str(run), "--out", str(out), "--json", str(data)]) == 0
    assert json.loads(data.read_text())["runs"] == [json.loads(json.dumps(record(run)))]


def test_a_model_cannot_write_into_the_page(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run, hostile, ignore=shutil.ignore_patterns("checkpoints", "export"))
    answers = json.loads((hostile / "samples" / "step-8.json").read_text())
    answers[0]["response"] = "</script><script>alert(2)</script>"
    (hostile / "samples" / "step-8.json").write_text(json.dumps(answers))
    assert main(["report", str(hostile), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script>alert(2)" not in text
    assert "<img src=x" not in text


@pytest.mark.parametrize(
    ("broken", "told"),
    [("absent", "neither a run folder nor a bundle"), ("empty", "is empty"), ("begun", "holds no step yet")],
)
def test_what_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path, broken: str, told: str
) -> None:
    if broken != "absent":
        first = (run / "ledger.jsonl").read_text().splitlines(keepends=True)[0]
        (tmp_path / "ledger.jsonl").write_text("" if broken == "empty" else first)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


_PROBE = """
  const last = plots.find(p => p.dataset.run === "run1");
  last.emit("plotly_click", {points: [{customdata: 3, data: {}}]});
  const found = plots.map(p => ({run: p.dataset.run, drawn: p.querySelectorAll(".main-svg").length,
    traces: p.data.map(t => ({name: t.name, x: t.x, y: t.y, lines: t.customdata}))}));
  return {found, behind: document.getElementById("behind").textContent};"""


@pytest.mark.browser
def test_in_a_browser_it_loads_without_errors_and_draws_the_ledgers_numbers(
    page: str, run: Path, tmp_path: Path
) -> None:
    probe = probed(page, _PROBE, tmp_path)
    assert all(plot["drawn"] for plot in probe["found"])
    expected = record(run)["steps"]
    for group in ("run0", "run1"):
        loss = next(p for p in probe["found"] if p["run"] == group)
        trace = next(t for t in loss["traces"] if t["name"] == "lm")
        assert trace["x"] == expected["step"]
        assert trace["y"] == expected["loss"]["lm"]
        assert trace["lines"] == expected["line"]
    third = (run / "ledger.jsonl").read_text().splitlines()[2]
    shown = probe["behind"].removeprefix("ledger.jsonl, line 3\n")
    assert json.loads(shown) == json.loads(third)
