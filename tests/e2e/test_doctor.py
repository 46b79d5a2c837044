"""The doctor as a user has it: a table and status 0 on this machine, lines to export, and a run that heeds it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import ROOT, fullweight

RECIPE = ROOT / "recipes" / "tiny_smoke.toml"
WRONG = {"GLOO_SOCKET_IFNAMES": "lo"}


def test_this_machine_is_ready(tmp_path: Path) -> None:
    """Status 0, every operation in the table, facts and findings in the file."""
    file = tmp_path / "doctor.json"
    ended = fullweight("doctor", "--recipe", RECIPE, "--json", file)
    assert ended.ok, ended.output
    assert "ready:" in ended.output
    assert "select_entries" in ended.output
    found = json.loads(file.read_text())
    assert found["machines"][0]["device"] == "cpu"
    assert found["needed_disk_bytes"] > 0
    assert all(f["severity"] == "note" for f in found["findings"])


def test_what_to_export() -> None:
    """A misspelt name: status 3, and with --fix the two lines that mend it."""
    ended = fullweight("doctor", "--quick", "--fix", environment=WRONG)
    assert ended.statuses == (3,), ended.output
    assert "did you mean 'GLOO_SOCKET_IFNAME'?" in ended.output
    assert 'unset GLOO_SOCKET_IFNAMES\nexport GLOO_SOCKET_IFNAME="lo"\n' in ended.output


def test_a_device_that_is_not_there_is_examined_all_the_same() -> None:
    """Each missing part is named."""
    ended = fullweight("doctor", "--quick", "--device", "ascend")
    assert ended.statuses == (1,), ended.output
    for what in ("torch_npu", "devices"):
        assert f"error {what}" in ended.output


def test_a_run_refuses_what_is_unwise_until_the_recipe_accepts_it(tmp_path: Path) -> None:
    """The message says how; the run that accepts it starts, and keeps its variables."""
    refused = fullweight("train", RECIPE, "--output", tmp_path / "no", environment=WRONG)
    assert refused.statuses == (1,)
    assert "did you mean 'GLOO_SOCKET_IFNAME'?" in refused.output
    assert 'device.accept = ["GLOO_SOCKET_IFNAMES"]' in refused.output
    assert not (tmp_path / "no").exists()
    accepted = fullweight(
        *("train", RECIPE, "--output", tmp_path / "yes", "--set", "train.num_steps=3"),
        *("--set", 'device.accept=["GLOO_SOCKET_IFNAMES"]', "--set", 'device.env.GLOO_LOG_LEVEL="WARN"'),
        environment=WRONG,
    )
    assert accepted.ok, accepted.output
    kept = json.loads((tmp_path / "yes" / "environment.json").read_text())
    assert kept["variables"]["GLOO_SOCKET_IFNAMES"] == "lo"
    assert kept["variables"]["GLOO_LOG_LEVEL"] == "WARN"
    assert kept["variables_of_recipe"]["values"] == {"GLOO_LOG_LEVEL": "WARN"}


def test_mistakes_of_the_command() -> None:
    """One message each."""
    for arguments, message in (
        (("--facts", "none.json"), "cannot be read"),
        (("--facts", "x", "--device", "cpu"), "leave out --recipe and --device"),
        (("--set", "train.seed=1"), "name one with --recipe"),
        (("--device", "tpu"), "no device named 'tpu'"),
    ):
        ended = fullweight("doctor", *arguments)
        assert ended.statuses == (1,)
        assert message in ended.output
        assert "Traceback" not in ended.output
