"""The README's own commands, run in order as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    """Every `bash` line (other than make) and then every `python` block works in a checkout of its own."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "data", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    lines = [line for line in shell.splitlines() if not line.startswith("make ")]
    python = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(lines) > 5
    assert python
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    for command in (["bash", "-euo", "pipefail", "-c", "\n".join(lines)], [sys.executable, "-c", python]):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=550
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for made in ("runs/demo/report.html", "runs/demo-two-ranks/export/config.json", "runs/fresh/config.json"):
        assert (tmp_path / made).is_file(), made
