"""`fullweight bench convert`: decoding and encoding FP4 and FP8 beside a plain copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError


def bench_convert_command(
    *,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="of copy and codecs alike")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the full record here")] = None,
) -> None:
    """FP4 and FP8 to bf16 and fp32 and back in GB/s of values, beside a copy of them. Exit 1 below a quarter."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from fullweight.bench.convert_bench import AIM, FLOOR, measure_convert
    from fullweight.train.run_folder import environment

    require_folder(json_file)
    stood_on = environment(1, torch.device("cpu"))
    if json_file is not None and stood_on["commit"] is None:
        raise ConfigError(
            "the code's commit is unknown, so a record of its speed would say nothing; leave out --json"
        )
    found = measure_convert(repeats=repeats, threads=threads, seed=seed)
    title = f"{found.rows:,} x {found.columns:,}, {found.threads} thread(s)"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("operation", "format", "codec", "values", "GB/s of values", "spread", "of copy"):
        table.add_column(name, justify="right" if name in ("GB/s of values", "spread", "of copy") else "left")
    for rate in found.rates:
        cells = (f"{rate.bytes_per_second / 1e9:.2f}", f"{rate.spread:.0%}", f"{rate.share_of_copy:.0%}")
        table.add_row(rate.operation, rate.format, rate.codec, rate.dtype, *cells)
    console = Console()
    console.print(table)
    worst = found.worst_decoder()
    console.print(
        f"slowest to bfloat16: {worst.format} by {worst.codec}, {worst.share_of_copy:.0%} of a copy "
        f"(aim {AIM:.0%}, at least {FLOOR:.0%})"
    )
    if found.waited_share is not None and found.waited_share > 0.05:
        console.print(
            f"disturbed: {found.waited_share:.0%} of the time went to waiting for a processor", style="red"
        )
    if json_file is not None:
        record = {"benchmark": "convert", **stood_on, "command": f"fullweight bench convert --seed {seed}"}
        write_text(json_file, json.dumps({**record, **found.as_json()}, indent=2) + "\n")
    if worst.share_of_copy < FLOOR:
        raise typer.Exit(1)
