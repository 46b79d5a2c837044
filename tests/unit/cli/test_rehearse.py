"""`fullweight rehearse` on chips of one's own."""

from __future__ import annotations

import json
from pathlib import Path

from fullweight.cli.main import main

_CHIP = """
[cramped]
base = "h200"
aliases = ["mine"]
memory_gb = 2.06
"""


def test_a_chip_of_ones_own(tmp_path: Path) -> None:
    """The file adds to the table, as for `plan`: its memory, less what the runtime takes, decides what fits."""
    (tmp_path / "mine.toml").write_text(_CHIP)
    out = tmp_path / "out.json"
    job = ["rehearse", "recipes/quickstart.toml", "--ranks", "1", "--set", "model.preset=tiny", "--processes", "1"]
    job += ["--chip", "mine", "--chip-file", str(tmp_path / "mine.toml"), "--json", str(out)]
    assert main(job) == 2
    found = json.loads(out.read_text())
    assert found["chip"] == "cramped"
    assert not found["all_fit"]
