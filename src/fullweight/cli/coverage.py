"""`fullweight coverage`: whether a run trained every parameter, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fullweight.cli.files import require_folder, writing

if TYPE_CHECKING:
    from rich.console import Console

_STATUS = {"supported": 0, "unsupported": 0, "refuted": 1, "not checkable": 3}
_COUNTS = ("reached", "changed_master", "changed_bf16", "changed_export")
_COLUMNS = ("elements", "reached", "changed fp32", "BF16", "export", "change / first", "largest")
_COLOURS = {"refutes": "red", "unsupports": "yellow", "hides": "yellow", "exception": "yellow", "note": "dim"}
_LEAST_WIDTH = 110  # a cut number is none; a terminal may break the line
_PLURAL = {"kind": "kinds", "layer": "layers", "expert": "experts", "tensor": "tensors"}
_STANDING = {"supported": "green", "refuted": "bold red"}


def coverage_command(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="this checkpoint of the run, wherever it lies, in place of the newest")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(help="where model.checkpoint of the recipe lies here, if it moved")
    ] = None,
    by: Annotated[Literal["kind", "layer", "expert", "tensor"], typer.Option(help="rows of the table")] = "kind",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write all of it here, not to coverage.json in the run folder")
    ] = None,
) -> None:
    """Measure what gradients reached and how far every tensor and expert moved; judge "full-parameter".

    Exit status: 0 what the recipe trains is covered; 1 that is refuted; 2 wrong usage; 3 not checkable.
    """
    from rich.console import Console

    from fullweight.checkpoint.generations import newest
    from fullweight.checkpoint.manifest import verify
    from fullweight.cli.bars import byte_bar
    from fullweight.evidence.coverage_report import report
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.train.coverage import measure_run
    from fullweight.train.run_folder import RunFolder, write_json

    require_folder(json_file)
    folder = RunFolder(run)
    folder.require()
    generation = verify(newest(folder.checkpoints) if checkpoint is None else checkpoint)
    architecture = DeepSeekV4Config.from_published(generation.manifest.facts.model)
    with byte_bar("measuring", 4 * architecture.num_parameters(mtp=True)) as progress:
        coverage = measure_run(folder, generation=generation, initial=initial, progress=progress)
    content = report(coverage)
    place = folder.coverage if json_file is None else json_file
    with writing(place):
        write_json(place, content)
    console = Console(soft_wrap=True)
    console.width = max(console.width, _LEAST_WIDTH)
    show(content, by, console)
    raise typer.Exit(_STATUS[content["claim"]["full_parameter"]])


def show(content: dict[str, Any], by: str, console: Console) -> None:
    """Print a coverage.json for a person: a table, what was found, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column(by, no_wrap=by != "tensor", overflow="fold")
    for column in (*_COLUMNS, *(["tokens"] if by == "expert" else [])):
        table.add_column(column, justify="right", no_wrap=True)
    groups = content[_PLURAL[by]]
    rows = groups.items() if isinstance(groups, dict) else [(entry["name"], entry) for entry in groups]
    for name, entry in rows:
        tokens = [str(entry["routed_tokens"])] if by == "expert" else []
        table.add_row(name, *_cells(entry), *tokens)
    table.add_section()
    table.add_row("all", *_cells(content["totals"]), style="bold")
    console.print(table)
    first, parameters = content["first_weights"], content["parameters"]
    console.print(
        Text(f"{content['generation']}: {parameters['trained']:,} of {parameters['total']:,} parameters train")
    )
    if first["known"]:
        console.print(Text(f"changes are since the first weights: {first['proof']}"))
    for finding in content["findings"]:
        console.print(
            Text(f"{finding['code']} ({finding['weight']}): {finding['text']}", _COLOURS[finding["weight"]])
        )
    status = content["claim"]["full_parameter"]
    console.print(Text("full-parameter: ").append(status, _STANDING.get(status, "bold yellow")))


def _cells(entry: dict[str, Any]) -> list[str]:
    shares = [_share(entry[name], entry["elements"]) for name in _COUNTS]
    sizes = ["?" if entry[k] is None else f"{entry[k]:.3g}" for k in ("relative_change", "largest_change")]
    return [f"{entry['elements']:,}", *shares, *sizes]


def _share(count: int | None, elements: int) -> str:
    """A percentage that says 100 % of nothing less than all, and 0 % of nothing more than none."""
    if count is None:
        return "?"
    if count in (0, elements):
        return f"{100 * count // max(elements, 1)} %"
    return f"{min(max(100 * count / elements, 0.01), 99.99):.2f} %"
