"""Published runs become cases or are rejected; the fitted model beats the null model on unseen groups."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from tests.processes import fullweight

from fullweight.core.errors import ConfigError
from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import Coefficients
from fullweight.planner.families import families
from fullweight.planner.fit import fit, judge, mean_error, orders, predict
from fullweight.planner.published import load
from fullweight.planner.software import Software, software

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
    """What docs/plan.md says: less than half the null model's error, at most 12 % on routed models, unseen too."""
    routed = [j for j in JUDGEMENTS if j.case.kind == "moe"]
    assert mean_error([j.unseen for j in JUDGEMENTS]) <= 0.5 * mean_error([j.null for j in JUDGEMENTS])
    assert mean_error([j.fitted for j in JUDGEMENTS]) <= 0.10
    assert mean_error([j.fitted for j in routed]) <= 0.10
    assert mean_error([j.unseen for j in routed]) <= 0.12
    assert mean_error([j.source_unseen for j in routed]) <= 0.12
    assert mean_error([j.source_unseen for j in JUDGEMENTS]) <= 0.5 * mean_error([j.null for j in JUDGEMENTS])


def test_first_choices_are_within_five_percent_of_the_best_measured() -> None:
    found = orders(JUDGEMENTS)
    assert len(found) >= 10
    assert max(order.first_over_best for order in found) <= 1.05
    many = [order for order in found if order.num_layouts > 4]
    assert len(many) == 4
    assert all(order.rank_correlation > 0.7 for order in many)


def test_a_source_is_wider_than_a_group() -> None:
    assert {case.source for case in CASES if "megatron_bridge" in case.name} == {"bridge"}
    assert len({case.group for case in CASES if case.source == "bridge"}) > 5


def test_what_a_release_used() -> None:
    """Of the last line that suits; a model without one takes what most recipes do there."""
    assert software("DeepSeekV3 (w/o MTP)", "GB300", "25.11") == Software()
    full = software("DeepSeekV3", "GB300", "26.06.01")
    assert (full.graphed, full.hidden_exchange, full.narrow_attention) == (2, True, True)
    assert software("Qwen3_235B_a22B", "B300", "26.02").dispatch == "plain"
    assert software("Mixtral 8x7B", "GB200", "26.04") == Software(graphed=1)
    assert software("Mixtral 8x7B", "H100", "26.04") == Software()


def test_a_row_says_its_release_in_its_source(tmp_path: Path) -> None:
    """The one it names, the newest where it names Megatron-Bridge alone, and nothing of other software."""
    lines = Path("src/fullweight/planner/runs/published_runs.csv").read_text().splitlines()
    row = next(line for line in lines if line.startswith("v4flash-gb300,"))
    source = row[row.index("verified-in-source,") :]
    sources = ("its own log", "Megatron-Bridge 25.09", "Megatron-Bridge PR", "arXiv 2609.26101")
    rows = [row.replace(source, f"verified-in-source,{other}") for other in sources]
    (tmp_path / "published_runs.csv").write_text("\n".join((lines[0], *rows)))
    cases, rejected = load(tmp_path)
    assert not rejected
    assert [case.job.graphed for case in cases] == [0, 1, 2, 0]


def test_runs_of_ones_own_are_predicted_without_a_fit(tmp_path: Path) -> None:
    """The coefficients of the package, whatever the runs say: ten times the rate is ten times too slow."""
    (tmp_path / "vtrain_multi.csv").write_text(
        "Parameters (billion),# GPUs,global batch,micro batch,hidden size,attention heads,# layers,"
        "sequence length,tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)\n"
        "3.6,64,512,8,3072,32,30,2048,1,64,1,3566.5\n3.6,64,512,8,3072,32,30,2048,1,64,1,356.65\n"
    )
    cases, _ = load(tmp_path)
    right, wrong = predict(cases, calibration().coefficients, CASES)
    assert wrong.seconds == right.seconds
    assert wrong.error + 1 == pytest.approx(10 * (right.error + 1))
    result = fullweight("bench", "planner", "--unseen", tmp_path)
    assert result.ok
    assert "all: 2 runs, mean error" in result.output


def test_a_model_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    """The same row under a name that is not known, with the same sizes in a file beside it."""
    table = Path("src/fullweight/planner/runs/megatron_bridge.csv").read_text().splitlines()
    row = next(line for line in table if ",Qwen3_30B_a3B,DGX-H100," in line)
    (tmp_path / "megatron_bridge.csv").write_text("\n".join((table[0], row.replace("Qwen3_30B_a3B", "Mine"))))
    cases, rejected = load(tmp_path)
    assert not cases
    assert "no shape of Mine is known" in rejected[0].reason
    sizes = families()["qwen3-30b-a3b"].model_dump(exclude={"name"})
    (tmp_path / "Mine.toml").write_text("\n".join(f"{k} = {str(v).lower()}" for k, v in sizes.items()))
    (case,) = load(tmp_path)[0]
    known = next(c for c in CASES if "Qwen3_30B_a3B DGX-H100" in c.name)
    assert case.job.work.training_flops == known.job.work.training_flops
    assert case.seconds == known.seconds


def test_a_folder_without_tables_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds none of published_runs\.csv"):
        load(tmp_path)


def test_the_command_says_how_many_coefficients(tmp_path: Path) -> None:
    result = fullweight("bench", "planner", "--json", str(tmp_path / "cases.json"))
    assert result.ok
    assert "13 coefficients, all global; 154 runs" in result.output
    assert (tmp_path / "cases.json").is_file()
