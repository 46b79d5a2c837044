"""Energy from the counter's file to joules a token: in ledger, sealed claim, report and comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.processes import ROOT, fullweight
from tests.unit.audit.metered import JOULES_A_READING

from fullweight.audit.rule import Status
from fullweight.audit.seal import seal
from fullweight.audit.verify import verify
from fullweight.cli.main import main


def test_a_counter_of_energy_becomes_joules_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is told is the sum over the ledger's lines, and that is what the counter counted."""
    run, settings = tmp_path / "run", {"train.num_steps": 4, "eval.num_samples": 0, "export.enabled": "false"}
    settings |= {"train.peak_flops_per_second": 1e12}
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    ended = fullweight(
        "train",
        ROOT / "recipes" / "tiny_smoke.toml",
        *chosen,
        "--output",
        run,
        environment={"POWERCAP": str(tmp_path / "powercap")},
        call="tests.unit.audit.metered:main",
    )
    assert ended.ok, ended.output
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert {line["power"]["source"] for line in steps} == {"RAPL energy counters, all packages of the machine"}
    joules = sum(line["power"]["watts"] * line["seconds"]["total"] for line in steps)
    # 10 J between the readings at a step's ends, which lie around the time that the line tells
    assert all(0 < line["power"]["watts"] * line["seconds"]["total"] < 1.001 * JOULES_A_READING for line in steps)
    a_token = joules / sum(line["tokens"]["real"] for line in steps)

    seal(run, tmp_path / "bundle")
    [claim] = [v for v in verify(tmp_path / "bundle").verdicts if v.claim == "energy-per-token"]
    assert (claim.status, claim.value) == (Status.holds, pytest.approx(a_token))
    page, data = tmp_path / "page.html", tmp_path / "compared.json"
    assert main(["report", str(tmp_path / "bundle"), "--out", str(page)]) == 0
    assert f"{a_token:.3g} J a token" in page.read_text()
    assert main(["compare", str(run), str(tmp_path / "bundle"), "--json", str(data)]) == 0
    assert "J/token" in capsys.readouterr().out
    costs = json.loads(data.read_text())["costs"]
    assert [side["joules_per_token"]["mean"] for side in costs.values()] == [pytest.approx(a_token)] * 2
