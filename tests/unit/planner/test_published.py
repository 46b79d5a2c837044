"""Published runs become cases or are rejected; the fitted model beats the null model on unseen groups."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from tests.processes import fullweight

from fullweight.core.errors import ConfigError
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import Coefficients
from fullweight.planner.fit import fit, judge, mean_error, orders
from fullweight.planner.published import load

CASES, REJECTED = load()
JUDGEMENTS = judge(CASES, calibration().coefficients)


def test_rows_are_read_or_rejected_with_a_reason() -> None:
    reasons = {row.name: row.reason for row in REJECTED}
    broken = [reason for reason in reasons.values() if reason.startswith("breaks the identity")]
    assert any("the row states 219" in reason for reason in broken)
    assert any("LoRA" in reason for reason in reasons.values())
    assert all(len(reason) > 10 for reason in reasons.values())
    one = next(c for c in CASES if "dsv3-gb200-256" in c.name)
    assert (one.job.pipeline, one.job.virtual, one.job.expert, one.seconds) == (4, 4, 64, 13.841)


def test_the_shipped_coefficients_are_those_of_the_shipped_runs() -> None:
    again = asdict(fit(CASES))  # a search by floating-point steps: equal to three digits on any machine
    assert asdict(calibration().coefficients) == pytest.approx(again, rel=5e-3)
    assert calibration().num_runs == len(CASES)
    assert len(Coefficients.names()) == 13 < len(CASES) / 10


def test_errors_against_the_null_model() -> None:
    """What docs/plan.md says: half the null model's error, 12 % on routed models seen; unseen ones are worse."""
    routed = [j for j in JUDGEMENTS if j.case.kind == "moe"]
    assert mean_error([j.unseen for j in JUDGEMENTS]) <= 0.5 * mean_error([j.null for j in JUDGEMENTS])
    assert mean_error([j.fitted for j in JUDGEMENTS]) <= 0.11
    assert mean_error([j.fitted for j in routed]) <= 0.12
    assert mean_error([j.unseen for j in routed]) <= 0.26


def test_first_choices_are_within_five_percent_of_the_best_measured() -> None:
    found = orders(JUDGEMENTS)
    assert len(found) == 4
    assert all(order.first_over_best <= 1.05 for order in found)
    assert all(order.rank_correlation > 0.7 for order in found)


def test_a_folder_without_tables_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"published_runs\.csv cannot be read"):
        load(tmp_path)


def test_the_command_says_how_many_coefficients(tmp_path: Path) -> None:
    result = fullweight("bench", "planner", "--json", str(tmp_path / "cases.json"))
    assert result.ok
    assert "13 coefficients, all global; 154 runs" in result.output
    assert (tmp_path / "cases.json").is_file()
