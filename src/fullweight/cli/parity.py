"""`fullweight parity`: our model beside transformers' on a checkpoint, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from fullweight.audit.parity import Parity


def parity_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="model folder: config.json and safetensors, any published format")
    ],
    *,
    documents: Annotated[str, typer.Option(help="lengths of the documents, in tokens")] = "1,5,64,130",
    seed: Annotated[int, typer.Option(min=0, help="of the documents' tokens")] = 0,
    ops: Annotated[str, typer.Option(help="operations of ours: auto, reference, ...")] = "auto",
    every: Annotated[bool, typer.Option("--all", help="print every module, not blocks and errors alone")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every error here")] = None,
) -> None:
    """Compare outputs and gradients with transformers and name the first module that differs; then exit with 1."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fullweight.audit.parity import BACKWARD_BOUND, FORWARD_BOUND, check_parity

    try:
        lengths = [int(part) for part in documents.split(",")]
    except ValueError:
        raise ConfigError(f"--documents takes lengths such as 1,5,64; found {documents!r}") from None
    require_folder(json_file)
    found = check_parity(checkpoint, lengths, seed, ops)
    console, table = Console(soft_wrap=True), Table(box=None)
    for title in ("module", f"forward (bound {FORWARD_BOUND:g})", f"gradient (bound {BACKWARD_BOUND:g})"):
        table.add_column(title, justify="left" if title == "module" else "right")
    for module in found.modules:
        beyond = module.forward > FORWARD_BOUND or (module.backward or 0.0) > BACKWARD_BOUND
        if every or beyond or module.name.count(".") < 2:
            backward = "" if module.backward is None else f"{module.backward:.1e}"
            table.add_row(module.name, f"{module.forward:.1e}", backward, style="red" if beyond else None)
    console.print(table)
    worst = max(found.parameters, key=lambda p: p.gradient)
    console.print(Text(f"{len(found.parameters)} parameters, worst gradient {worst.gradient:.1e}: {worst.name}"))
    if found.mostly_rounding:
        told = ", ".join(f"{p.name} {p.in_float64 or 0.0:.1e}" for p in found.mostly_rounding)
        console.print(Text(f"gradients that all but cancel, compared in float64: {told}"))
    if found.decoded:
        console.print(
            Text(f"{checkpoint} is quantised: transformers was given its values in FP32, as we read them")
        )
    console.print(Text(_verdict(found), style="bold" if found.holds else "bold red"))
    if json_file is not None:
        text = json.dumps({**asdict(found), "holds": found.holds, "verdict": _verdict(found)}, indent=2)
        write_text(json_file, text.replace("Infinity", '"inf"') + "\n")
    if not found.holds:
        raise typer.Exit(1)


def _verdict(found: Parity) -> str:
    if found.holds:
        return f"parity holds on {found.num_tokens} tokens, forward and backward"
    told = []
    if found.first_forward is not None:
        told.append(f"forward differs first in {found.first_forward}")
    if found.first_backward is not None:
        told.append(f"backward differs first, from the loss back, in {found.first_backward}")
    if found.bad_parameters:
        names = [p.name for p in found.bad_parameters]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told.append(f"gradients of {len(names)} parameters differ: {', '.join(names[:3])}{more}")
    return "; ".join(told)
