"""`fullweight bench model`: speed and memory of a training step, beside transformers and the matmul peak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fullweight.bench.suite import Row, Side, Summary

_DISTURBED = 0.05
"""Share of the time waited for a processor above which other work has spoilt the figures."""

bench_app = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@bench_app.callback()
def _group() -> None:
    """Keeps `model` a command of a group while it is the only one."""


@bench_app.command("model")
def model_command(
    lengths: Annotated[
        str, typer.Option(help="tokens of the row, one measurement each")
    ] = "1024,4096,16384,32768",
    *,
    preset: Annotated[str, typer.Option(help="model to measure")] = "bench",
    documents: Annotated[int, typer.Option(min=1, help="documents that the row is split into")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    transformers_up_to: Annotated[
        int, typer.Option(min=0, help="longest row that transformers runs too; 0 for none")
    ] = 4096,
    transformers_experts: Annotated[
        str, typer.Option(help="its experts: eager, grouped_mm or batched_mm (slow on a CPU)")
    ] = "eager",
    rounds: Annotated[int, typer.Option(min=1, help="passes over all lengths in fresh processes")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="fewest timed steps of a process")] = 3,
    warm_up: Annotated[int, typer.Option(min=0, help="fewest steps before them")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="least time for timed steps, half for warm-up")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="all physical cores when absent")] = None,
    seed: Annotated[int, typer.Option(min=0, help="weights and tokens")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the full record here")] = None,
) -> None:
    """One full bf16 training step (forward, backward, optimizer) on the CPU, at each length."""
    import torch
    from rich.console import Console

    from fullweight.bench.measure import BenchConfig
    from fullweight.bench.suite import record, run_suite, stands_on, summarise

    values = {
        "preset": preset,
        "lengths": _parse_lengths(lengths),
        "documents": documents,
        "optimizer": optimizer,
        "transformers_up_to": transformers_up_to,
        "transformers_experts": transformers_experts,
        "rounds": rounds,
        "repeats": repeats,
        "warm_up": warm_up,
        "seconds": seconds,
        "seed": seed,
        "threads": threads or torch.get_num_threads(),
    }
    config = BenchConfig.resolve(values, "fullweight bench model")
    require_folder(json_file)
    stood_on = stands_on(config) if json_file is not None else {}
    progress = Console(stderr=True)
    with progress.status("") as status:
        runs = run_suite(config, status.update)
    summary = summarise(config, runs)
    print_summary(summary, Console(), config.optimizer)
    if json_file is not None:
        text = json.dumps(record(config, runs, summary, stood_on), indent=2) + "\n"
        write_text(json_file, text)
    if any(run.kind == "fullweight" and run.error for run in runs):
        raise typer.Exit(1)


def _parse_lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths takes numbers such as 1024,4096; found {text!r}") from None


def print_summary(summary: Summary, console: Console, optimizer: str) -> None:
    """A table of the lengths, then what they say together."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"one training step in bf16, {optimizer}", title_justify="left", box=None)
    names = ("tokens", "", "tokens/s", "spread", "peak GB", "minus\nimports", "GFLOP/s", "of\nmatmul")
    for name in names:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in summary.rows:
        _add_rows(table, row)
    console.print(table)
    lines = [f"matmul peak {summary.matmul_flops_per_second / 1e9:,.0f} GFLOP/s (bf16, weights stored [out, in])"]
    if summary.worst_over_best_flops is not None and len(summary.rows) > 1:
        lines.append(f"slowest length reaches {summary.worst_over_best_flops:.0%} of the best GFLOP/s")
    if summary.memory_bytes_per_token is not None and summary.memory_fixed_bytes is not None:
        lines.append(
            f"memory {summary.memory_fixed_bytes / 1e9:.2f} GB + "
            f"{summary.memory_bytes_per_token / 1e3:,.1f} kB a token; "
            f"largest deviation {summary.memory_largest_deviation:.1%}"
        )
    for row in summary.rows:
        sides = (("fullweight", row.fullweight), ("transformers", row.transformers))
        lines += [f"{row.length:,} tokens, {name}: {_phases(side)}" for name, side in sides if side is not None]
    lines.append("FLOPs: exact sparse model FLOPs over the whole step's time.")
    lines.append("transformers runs no optimizer, no MTP and no indexer loss.")
    for line in lines:
        console.print(Text(line))
    if summary.waited_share is not None and summary.waited_share > _DISTURBED:
        share = f"up to {summary.waited_share:.0%} of a measurement"
        console.print(
            Text(f"disturbed: {share} went to waiting for a processor; run again on an idle machine", "red")
        )
    for error in (e for row in summary.rows for e in row.errors):
        console.print(Text(f"failed: {error}", "red"))


def _add_rows(table: Table, row: Row) -> None:
    if row.fullweight is not None:
        assert row.flops_per_second is not None
        assert row.share_of_matmul is not None
        rate, share = f"{row.flops_per_second / 1e9:,.1f}", f"{row.share_of_matmul:.1%}"
        table.add_row(f"{row.length:,}", "fullweight", *_cells(row.fullweight), rate, share)
    if row.transformers is not None:
        table.add_row(f"{row.length:,}", "transformers", *_cells(row.transformers), "", "")
    if row.speed_ratio is not None:
        table.add_row("", "ratio", f"{row.speed_ratio:.2f}", "", f"{row.memory_ratio:.2f}", "", "", "")


def _cells(side: Side) -> tuple[str, str, str, str]:
    return (
        f"{side.tokens_per_second:,.0f}",
        f"{side.spread:.0%}",
        f"{side.peak_bytes / 1e9:.2f}",
        f"{side.bytes_above_baseline / 1e9:.2f}",
    )


def _phases(side: Side) -> str:
    phases = side.seconds_by_phase.items()
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases if seconds >= 5e-3)
