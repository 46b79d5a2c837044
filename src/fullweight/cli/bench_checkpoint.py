"""`fullweight bench checkpoint`: saving, verifying and loading, beside the disk and the library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError


def bench_checkpoint_command(
    folder: Annotated[Path, typer.Argument(help="where to write, so that its disk is measured")] = Path(),
    *,
    megabytes: Annotated[int, typer.Option(min=1, help="size of the state; three times that is written")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the full record here")] = None,
) -> None:
    """What a checkpoint costs: each part in GB/s, the stall of training, and training's speed meanwhile."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from fullweight.bench.checkpoint_bench import measure_checkpoint
    from fullweight.train.run_folder import environment

    if not folder.is_dir():
        raise ConfigError(f"no folder {folder} to write in; create it")
    require_folder(json_file)
    stood_on = environment(1, torch.device("cpu"))
    if json_file is not None and stood_on["commit"] is None:
        raise ConfigError(
            "the code's commit is unknown, so a record of its speed would say nothing; leave out --json"
        )
    found = measure_checkpoint(folder, megabytes, repeats, seed)
    title = f"state of {found.size_bytes / 1e6:,.0f} MB, up to {found.threads} thread(s)"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("operation", "seconds", "GB/s", "spread"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for timing in found.timings:
        rate = f"{timing.bytes_per_second / 1e9:.2f}"
        table.add_row(timing.operation, f"{timing.seconds:.3f}", rate, f"{timing.spread:.0%}")
    console = Console()
    console.print(table)
    ours, library = found.seconds("save: hashed, read back"), found.seconds("torch.distributed.checkpoint save")
    console.print(f"digests and reading back: {ours - library:+.3f} s on {library:.3f} s of the library alone")
    console.print(
        f"training waits {found.stall_seconds:.3f} s for a save in the background, and runs at "
        f"{found.training_speed_meanwhile:.0%} of its speed during the {found.seconds_meanwhile:.1f} s of writing"
    )
    if found.waited_share is not None and found.waited_share > 0.05:
        console.print(
            f"disturbed: {found.waited_share:.0%} of the time went to waiting for a processor", style="red"
        )
    if json_file is not None:
        command = f"fullweight bench checkpoint --megabytes {megabytes} --repeats {repeats} --seed {seed}"
        record = {"benchmark": "checkpoint", **stood_on, "command": command}
        write_text(json_file, json.dumps({**record, **found.as_json()}, indent=2) + "\n")
