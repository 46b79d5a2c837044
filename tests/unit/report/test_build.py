"""The page and the pictures are made from the run folder alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fullweight.core.errors import CheckpointError
from fullweight.report.build import build_report, facts


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
        "experts": {"max_over_mean": 1.5, "dead": 2, "num_experts": 8},
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
