"""The doctor under a launcher: every machine's facts, what differs named, the same exit status on every rank."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import fullweight


def test_two_ranks_are_examined(tmp_path: Path) -> None:
    """All six collectives are tried and right, operations are tested on both ranks, clocks agree."""
    file = tmp_path / "doctor.json"
    ended = fullweight("doctor", "--json", file, "--device", "cpu", ranks=2)
    assert ended.ok, ended.output
    found = json.loads(file.read_text())
    assert [c["collective"] for c in found["collectives"]] == [
        *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send and receive"),
    ]
    assert all(c["correct"] and c["gigabytes_per_second"] > 0 for c in found["collectives"])
    assert [m["rank"] for m in found["machines"]] == [0, 1]
    assert all(len(m["operations"]) > 40 for m in found["machines"])
    assert all(abs(m["clock_offset_seconds"]) < 60 for m in found["machines"])
    assert ended.output.count("ready:") == 1  # rank 0 alone prints


def test_a_rank_with_another_environment_is_named(tmp_path: Path) -> None:
    """The rank, the variable and both values; a missing interface is an error, and every rank says so."""
    file = tmp_path / "doctor.json"
    entry = "tests.multi.doctor_ranks:differing"
    ended = fullweight("doctor", "--quick", "--json", file, "--device", "cpu", ranks=2, call=entry)
    assert ended.statuses == (1, 1), ended.output
    findings = {f["name"]: f for f in json.loads(file.read_text())["findings"]}
    assert findings["TORCH_SHOW_CPP_STACKTRACES"]["severity"] == "warning"
    assert "rank 1" in findings["TORCH_SHOW_CPP_STACKTRACES"]["where"]
    assert {findings["TORCH_SHOW_CPP_STACKTRACES"][k].split(",")[0] for k in ("found", "expected")} == {
        "1",
        "unset",
    }
    assert findings["GLOO_SOCKET_IFNAME"]["severity"] == "error"
    assert "rank 1" in findings["GLOO_SOCKET_IFNAME"]["where"]
    again = fullweight("doctor", "--facts", file)  # the same facts, examined elsewhere
    assert again.statuses == (1,)
    assert "rank 1" in again.output
