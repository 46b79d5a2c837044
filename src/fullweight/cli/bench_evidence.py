"""`fullweight bench evidence`: what recording costs a step."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError


def bench_evidence_command(
    recipe: Annotated[Path, typer.Argument(help="the run whose steps are measured")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b=c; repeatable")] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps recorded, and as many that are not")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the full record here")] = None,
) -> None:
    """The share of a step's time that goes into its line of the ledger, on this machine."""
    import torch
    from rich.console import Console

    from fullweight.bench.evidence_bench import measure_evidence
    from fullweight.core.config import apply_overrides, read_toml
    from fullweight.train.config import RunConfig
    from fullweight.train.run_folder import environment

    values = apply_overrides(read_toml(recipe), overrides or [])
    require_folder(json_file)
    stood_on = environment(1, torch.device("cpu"))
    if json_file is not None and stood_on["commit"] is None:
        raise ConfigError(
            "the code's commit is unknown, so a record of its speed would say nothing; leave out --json"
        )
    with tempfile.TemporaryDirectory(prefix="bench-evidence-") as folder:
        found = measure_evidence(RunConfig.resolve(values, str(recipe)), Path(folder), steps)
    console = Console()
    console.print(
        f"recording: {found.share:.2%} of a step: {found.recording_seconds * 1e3:.2f} ms "
        f"({found.digest_seconds * 1e3:.2f} ms digests) beside {found.step_seconds * 1e3:,.1f} ms, "
        f"{found.line_bytes:,} bytes a line",
        highlight=False,
    )
    console.print(
        f"recorded steps take {found.difference_seconds * 1e3:+.2f} ms, where steps differ by {found.spread:.0%}",
        highlight=False,
    )
    if found.waited_share is not None and found.waited_share > 0.05:
        console.print(
            f"disturbed: {found.waited_share:.0%} of the time went to waiting for a processor", style="red"
        )
    if json_file is not None:
        chosen = [part for setting in overrides or [] for part in ("--set", setting)]
        command = shlex.join(["fullweight", "bench", "evidence", str(recipe), *chosen, "--steps", str(steps)])
        record = {"benchmark": "evidence", **stood_on, "command": command}
        write_text(json_file, json.dumps({**record, **found.as_json()}, indent=2) + "\n")
