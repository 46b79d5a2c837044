"""The page and the pictures are made from the run folder alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.errors import CheckpointError
from fullweight.report.build import build_report, data_facts, facts


def step_line(step: int, loss: float | str) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "loss": {"lm": loss, "mtp": loss, "balance": 1.0},
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": {"so_far": 100 * step},
        "tokens_per_second": 1000.0 * step,
        "mfu": 0.1 * step,
        "mfu_convention": "exact",
        "peak": {"flops_per_second": 4e11, "source": "measured"},
        "experts": {"max_over_mean": 1.5, "dead": 2, "num_experts": 8, "dropped": 0},
        "parameters": {"total": 1000, "trained": 1000},
        "routing": "natural",
        "seconds": {"total": 50.0},
        "skipped": "lm loss nan" if isinstance(loss, str) else None,
    }


def evaluation(step: int, loss: float, score: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": {"lm": loss}, "score": score, "num_scored": 4}


def make_run(root: Path, lines: list[dict[str, Any]]) -> None:
    (root / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    (root / "config.json").write_text('{"name": "<b>run</b>"}')
    (root / "environment.json").write_text("{}")
    (root / "samples").mkdir()
    answer = {"id": "a", "question": "1 < 2?", "response": "<script>", "expected": "yes", "correct": False}
    for step in (0, 10):
        (root / "samples" / f"step-{step}.json").write_text(json.dumps([answer | {"correct": step == 10}]))


def test_the_page_stands_alone_and_escapes_what_models_say(tmp_path: Path) -> None:
    """Pictures are inside, nothing is fetched, and generated text cannot become markup."""
    lines = [evaluation(0, 6.0, 0.0), step_line(1, 5.0), step_line(2, "nan"), step_line(3, 3.0)]
    make_run(tmp_path, [*lines, evaluation(3, 2.5, 0.75)])
    page = build_report(tmp_path).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "0.0% to 75.0% of 4" in page
    assert "6.0000 to 2.5000" in page
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".*"))


def test_facts_state_median_without_the_first_step_and_refused_steps() -> None:
    """The first step warms up caches; a refused step is counted, not hidden."""
    found = dict(facts([step_line(1, 5.0), step_line(2, 4.0), step_line(4, 3.0), step_line(6, "nan")], []))
    assert found["tokens per second"].startswith("4,000")
    assert found["steps refused (non-finite)"] == "1"
    assert found["stepping time"] == "3 min 20 s"
    assert found["training loss"] == "5.0000 to nan (next token)"
    assert "held-out loss" not in found


def test_a_run_without_steps_has_nothing_to_report(tmp_path: Path) -> None:
    """One message instead of an empty page."""
    make_run(tmp_path, [evaluation(0, 6.0, None)])
    with pytest.raises(CheckpointError, match="no step yet"):
        build_report(tmp_path)


def test_a_held_out_loss_that_is_no_number_is_shown_as_it_was_recorded() -> None:
    """The ledger writes NaN by its name; a diverged run still gets its page."""
    lines = [evaluation(0, 6.0, None), evaluation(1, "nan", None)]  # type: ignore[arg-type]
    assert dict(facts([step_line(1, 5.0)], lines))["held-out loss"] == "6.0000 to nan"


def test_what_became_of_each_source_is_on_the_page(tmp_path: Path) -> None:
    """Counts of the newest event that has them; a side without samples is left out."""
    side = {"samples": 1200, "tokens": 9, "trained_tokens": 5, "truncated": 0}
    side |= {"dropped_too_long": 2, "dropped_untrained": 1}
    source = {"name": "a.jsonl", "records": 1204, "duplicates": 1, "also_held_out": 0}
    source |= {"train": side, "held_out": dict.fromkeys(side, 0)}
    event = {"kind": "event", "step": 0, "what": "start"}
    again = event | {"what": "resume"}
    lines = [event, again | {"data": [source | {"records": 7}]}, again | {"data": [source]}, again]
    told = "1,204 records; 1 duplicates; train: 1,200 samples of 9 tokens (0 truncated, 2 dropped as too long, "
    told += "1 dropped without a trained token)"
    assert data_facts(lines) == [("data: a.jsonl", told)]
    assert data_facts([event]) == []
    make_run(tmp_path, [*lines, step_line(1, 5.0)])
    assert told in build_report(tmp_path).read_text()
