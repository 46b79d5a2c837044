"""The page and the picture are made from the run folder alone, whatever models or strangers wrote into it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.recorded import evaluation, step_line

from fullweight.core.errors import CheckpointError
from fullweight.evidence.bundle import RefusedError
from fullweight.evidence.ledger import Ledger
from fullweight.report.document import RULE, headline, write_report, write_run
from fullweight.report.record import raw_lines, record

ANSWER = {"id": "a", "question": "1 < 2?", "response": "<img src=x>", "expected": "yes", "correct": False}


def make_run(root: Path, lines: list[tuple[str, int, dict[str, Any]]], **told: Any) -> Path:
    """A run folder with these lines, and half a line that a kill left."""
    ledger = Ledger(root / "ledger.jsonl")
    ledger.begin("start", 0, {"format": 2, **told})
    for kind, step, entry in lines:
        ledger.append(kind, step, entry)
    ledger.close()
    with (root / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"torn')
    (root / "config.json").write_text('{"name": "<b>run</b>"}')
    (root / "samples").mkdir()
    for step in (0, 3, 10):
        (root / "samples" / f"step-{step}.json").write_text(json.dumps([ANSWER | {"correct": step == 10}]))
    return root


def written(root: Path) -> str:
    write_run(root, root / "report.html", root / "plots" / "loss.png")
    return (root / "report.html").read_text()


def test_the_page_stands_alone_and_leads_with_what_was_learnt(tmp_path: Path) -> None:
    """Nothing is fetched, generated text cannot become markup, and answers come before how they were made."""
    lines = [("eval", 0, evaluation(6.0, 0.0)), ("step", 1, step_line(1, 5.0)), ("step", 2, step_line(2, "nan"))]
    lines += [
        ("eval", 2, evaluation(4.0, 0.5)),
        ("step", 3, step_line(3, 3.0)),
        ("eval", 3, evaluation(2.5, 0.75)),
    ]
    make_run(tmp_path, lines)
    page = written(tmp_path)
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", outside)
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
    assert "&lt;b&gt;run" in page
    assert "0.0 % to 75.0 % of 4" in page
    assert "6.0000 to 2.5000" in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:6] == [
        *("Loss", "Held-out score", "What it answers"),
        *("What it comes to", "Claims", "Tokens per second and MFU"),
    ]
    assert page.index("Not verified") < page.index("0.0 % → 75.0 %") < page.index("<h2>Loss</h2>")
    assert page.index("before</th><th>after") < page.index('<span class="holds">right</span>')
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        (("holds", "holds", "not checkable"), "Nothing is refuted: 2 claims hold; 1 claim or rule cannot be"),
        (("not checkable", "refuted", "holds"), "Refuted: claim-1. 1 claim holds; 1 claim or rule cannot be"),
        (("holds", "holds", "holds"), "Nothing is refuted: 3 claims hold."),
    ],
)
def test_the_verdict_is_above_the_fold_and_what_is_refuted_comes_first(
    tmp_path: Path, statuses: tuple[str, ...], told: str
) -> None:
    root = make_run(tmp_path, [("eval", 0, evaluation(6.0, None)), ("step", 1, step_line(1, 5.0))])
    found = record(root)
    claims = [
        {"name": f"claim-{number}", "value": "1", "status": status, "told": "", "statement": ""}
        for number, status in enumerate(statuses)
    ]
    write_report(tmp_path / "page.html", [found | {"kind": "bundle", "claims": claims}], [raw_lines(root)])
    page = (tmp_path / "page.html").read_text()
    assert page.index(told) < page.index("<h2>Loss</h2>") < page.index("<h2>Claims</h2>")
    rows = re.findall(r'<td class="claim">(claim-\d)', page)
    assert [statuses[int(row[-1])] for row in rows] == sorted(
        statuses, key=["refuted", "holds", "not checkable"].index
    )


def test_what_falls_with_a_rule_is_counted_and_not_listed(tmp_path: Path) -> None:
    """A changed byte refutes every claim; the sentence names what is wrong, the long reason stays in its cell."""
    root = make_run(tmp_path, [("eval", 0, evaluation(6.0, None)), ("step", 1, step_line(1, 5.0))])
    keys = ("name", "status", "told", "statement")
    long = "x" * 500
    rows = [
        ("steps", "refuted", "bundle.hashes: another file", "so many steps"),
        ("mfu", "refuted", "bundle.hashes: another file", "so much of the peak"),
        ("tokens", "refuted", "5 is claimed, 4 follows from the evidence", "so many tokens"),
        ("bundle.hashes", "refuted", long, RULE),
    ]
    claims = [dict(zip(keys, row, strict=True)) | {"value": "1"} for row in rows]
    write_report(tmp_path / "page.html", [record(root) | {"kind": "bundle", "claims": claims}], [raw_lines(root)])
    page = (tmp_path / "page.html").read_text()
    assert "Refuted: bundle.hashes, tokens, and with it 2 claims. 0 claims hold." in page
    assert f'<td class="why" data-name="why">{long}</td>' in page
    assert re.search(r"td\.why \{ overflow-wrap: anywhere; \}", page), "a long word must not widen the page"


def test_no_button_of_a_figure_sends_its_numbers_away(tmp_path: Path) -> None:
    """The library would offer an upload to its vendor beside each figure unless told not to."""
    page = written(make_run(tmp_path, [("step", 1, step_line(1))]))
    drawn = page.count('class="plotly-graph-div"')
    assert drawn == page.count('"showSendToCloud": false') > 0


def test_the_headline_says_what_was_refused_and_what_is_no_number(tmp_path: Path) -> None:
    """The ledger writes NaN by its name; a diverged run still gets its page, and a skipped step is counted."""
    lines = [("eval", 0, evaluation(6.0, None)), ("step", 1, step_line(1, 5.0)), ("step", 2, step_line(2, "nan"))]
    make_run(tmp_path, [*lines, ("eval", 2, evaluation("nan", None))])
    found = dict(headline(record(tmp_path)))
    assert found["steps"] == "2, 1 skipped, not finished"
    assert found["training loss"] == "5.0000 to nan"
    assert found["held-out loss"] == "6.0000 to nan"
    assert "held-out score" not in found
    assert found["parameters"] == "1, all trained"


def test_a_run_without_steps_has_nothing_to_report(tmp_path: Path) -> None:
    """One message instead of an empty page."""
    make_run(tmp_path, [("eval", 0, evaluation(6.0, None))])
    with pytest.raises(CheckpointError, match="no step yet"):
        written(tmp_path)


def test_what_became_of_each_source_is_on_the_page(tmp_path: Path) -> None:
    """Counts of the newest event that has them; a side without samples is left out."""
    side = {"samples": 1200, "tokens": 9, "trained_tokens": 5, "truncated": 0}
    side |= {"dropped_too_long": 2, "dropped_untrained": 1}
    source = {"name": "a.jsonl", "records": 1204, "duplicates": 1, "also_held_out": 0}
    source |= {"train": side, "held_out": dict.fromkeys(side, 0)}
    again = {"what": "export", "data": [source]}
    make_run(tmp_path, [("step", 1, step_line(1)), ("event", 1, again)], data=[source | {"records": 7}])
    told = "1,204 records; 1 duplicates; train: 1,200 samples of 9 tokens (0 truncated, 2 dropped as too long, "
    told += "1 dropped without a trained token)"
    assert dict(headline(record(tmp_path)))["data: a.jsonl"] == told
    assert told in written(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples/step-10.json", "{}"),
        ("samples/step-10.json", '[{"question": 1}]'),
        ("coverage.json", '{"tensors": []}'),
        ("coverage.json", "[]"),
        ("config.json", "{"),
    ],
)
def test_files_of_another_shape_are_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    """A stranger's bundle may hold anything; the message says which file it is, and no page is written."""
    make_run(tmp_path, [("step", 1, step_line(1))])
    (tmp_path / name).write_text(content)
    with pytest.raises(RefusedError, match=r"^bundle\.json: " + name.rpartition("/")[2]):
        written(tmp_path)
    assert not (tmp_path / "report.html").exists()
