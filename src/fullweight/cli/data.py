"""`fullweight data inspect`: look at a data set as the trainer sees it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullweight.core.config import apply_overrides, read_toml
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fullweight.data.inspect import Report, ShownSample
    from fullweight.data.tokenised import DataConfig

data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)

_BAR = 40
_MAX_CHARACTERS = 6000
_TRAINED, _CONTEXT = "bold green", "dim"


@data_app.callback()
def _group() -> None:
    """Keeps `inspect` a command of a group while it is the only one."""


@data_app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="recipe (.toml), or a data file, folder or dataset name")],
    *,
    tokenizer: Annotated[
        str | None, typer.Option(help='"deepseek-v4" (the default) or a folder with tokenizer.json')
    ] = None,
    row_tokens: Annotated[int | None, typer.Option(help="tokens of a packed row (8192 for a data file)")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="of a data file, such as prompt=problem,answer=solution or text=body"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="of a recipe, such as data.row_tokens=4096")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="samples to show")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Show samples with their trained tokens, lengths, packing, and what was dropped and why."""
    from fullweight.data.inspect import inspect
    from fullweight.data.tokenizer import load_tokenizer

    config = _data_config(source, tokenizer, row_tokens, columns, overrides or [])
    report = inspect(config, load_tokenizer(config.tokenizer), samples)
    if as_json:
        typer.echo(json.dumps(asdict(report), ensure_ascii=False, indent=2))
    else:
        from rich.console import Console

        print_report(report, Console())


def _data_config(
    source: str, tokenizer: str | None, row_tokens: int | None, columns: str | None, overrides: list[str]
) -> DataConfig:
    from fullweight.data.tokenised import DataConfig

    if source.endswith(".toml"):
        if columns is not None:
            raise ConfigError("--columns is for a data file; a recipe says its columns in [data]")
        values = apply_overrides(read_toml(source), overrides)
        if not isinstance(values.get("data"), dict):
            raise ConfigError(f"{source} has no [data] section; found: {', '.join(values) or 'nothing'}")
        data = dict(values["data"])
    else:
        if overrides:
            raise ConfigError(
                "--set is for a recipe; use --tokenizer, --row-tokens and --columns with a data file"
            )
        file: dict[str, Any] = {"kind": "file", "path": source, "columns": _parse_columns(columns)}
        data = {"sources": [file], "row_tokens": 8192, "too_long": "truncate"}
    if tokenizer is not None:
        data["tokenizer"] = tokenizer
    if row_tokens is not None:
        data["row_tokens"] = row_tokens
    return DataConfig.resolve(data, f"{source} [data]" if Path(source).suffix == ".toml" else "options")


def _parse_columns(text: str | None) -> dict[str, str]:
    columns = {}
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise ConfigError(f"--columns takes key=column pairs, such as prompt=problem; found {part!r}")
        columns[key.strip()] = value.strip()
    return columns


def print_report(report: Report, console: Console) -> None:
    """Write a report for a person; without colour, trained tokens stand between ⟦ and ⟧."""
    for sample in report.samples:
        _print_sample(sample, console)
    console.print(_sources_text(report))
    console.print(_histogram_table(report))
    console.print(_packing_table(report))
    speed = (
        "from the token cache" if report.tokens_per_second is None else f"{report.tokens_per_second:,.0f} tokens/s"
    )
    console.print(f"encoding: {speed}, tokenizer {report.tokenizer}; prepared in {report.prepare_seconds:.1f} s")


def _print_sample(sample: ShownSample, console: Console) -> None:
    from rich.panel import Panel
    from rich.text import Text

    plain = console.color_system is None
    body, room = Text(), _MAX_CHARACTERS
    for run in sample.runs:
        text = run.text if len(run.text) <= room else run.text[:room] + " … (cut here)"
        body.append(f"⟦{text}⟧" if plain and run.trained else text, _TRAINED if run.trained else _CONTEXT)
        room -= len(run.text)
        if room <= 0:
            break
    trained = sum(r.num_tokens for r in sample.runs if r.trained)
    total = sum(r.num_tokens for r in sample.runs)
    legend = Text.assemble(
        ("⟦trained⟧" if plain else "trained", _TRAINED),
        f" {trained} tokens, ",
        ("context", _CONTEXT),
        f" {total - trained} tokens",
    )
    console.print(Panel(body, title=Text(f"sample {sample.id}"), subtitle=legend))


def _sources_text(report: Report) -> Text:
    from rich.text import Text

    text = Text()
    for source in report.sources:
        text.append(source.name, "bold")
        text.append(f": {source.records:,} records, {source.duplicates:,} duplicates")
        if source.also_held_out:
            text.append(f", {source.also_held_out:,} with a held-out question")
        text.append("\n")
        for name, counts in (("train", source.train), ("held out", source.held_out)):
            if any(asdict(counts).values()):
                text.append(
                    f"  {name}: {counts.samples:,} samples, {counts.tokens:,} tokens "
                    f"({counts.trained_tokens:,} trained)\n    truncated {counts.truncated:,}; dropped "
                    f"{counts.dropped_too_long:,} too long, {counts.dropped_untrained:,} untrained\n"
                )
    return text


def _histogram_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="tokens of a training sample", title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    longest = max(report.length_counts)
    for low, high, count in zip(report.length_edges, report.length_edges[1:], report.length_counts, strict=False):
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", "█" * -(-count * _BAR // longest))
    return table


def _packing_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title=f"packing into rows of {report.train.row_tokens:,} tokens", title_justify="left")
    for name in ("pass", "samples", "tokens", "rows", "efficiency", "most documents\nin a row"):
        table.add_column(name, justify="left" if name == "pass" else "right")
    for name, packing in (("epoch 0", report.train), ("held out", report.held_out)):
        if packing is not None:
            table.add_row(
                name,
                f"{packing.samples:,}",
                f"{packing.tokens:,}",
                f"{packing.rows:,}",
                f"{packing.efficiency:.2%}",
                f"{packing.max_documents_per_row}",
            )
    return table
