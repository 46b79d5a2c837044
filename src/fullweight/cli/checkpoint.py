"""`fullweight checkpoint`: list, verify, compare and remove the saved states of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import write_text
from fullweight.core.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from fullweight.checkpoint.compare import Comparison

checkpoint_app = typer.Typer(help="Look after saved training states.", no_args_is_help=True)

_RUN = "folder of a run"
_EITHER = "folder of a run (its newest checkpoint) or of one checkpoint"
_GIVE = f"give the {_EITHER}"


@checkpoint_app.command("ls")
def ls_command(run: Annotated[Path, typer.Argument(help=_RUN)]) -> None:
    """List a run's checkpoints, oldest first, `verify` reads them; exit status 1 when one shows damage."""
    from rich.table import Table

    from fullweight.checkpoint import generations
    from fullweight.checkpoint.manifest import CorruptError, read_manifest

    folder = _folder(run)
    damaged: list[str] = []  # told below the table, whose width they would take
    try:
        pointer = generations.read_pointer(folder)
    except CorruptError as error:
        pointer = None
        damaged.append(str(error))
    table = Table(box=None)
    for name in ("checkpoint", "step", "written (UTC)", "ranks", "MB", "torch", ""):
        table.add_column(name, no_wrap=True)
    for step, path in generations.listed(folder):
        mark = "latest" if pointer and pointer[0] == path.name else ""
        try:
            manifest = read_manifest(path)[0]
        except CorruptError as error:
            table.add_row(path.name, str(step), "", "", "", "", "damaged")
            damaged.append(str(error))
            continue
        facts = manifest.facts
        written, size = manifest.written_at.removesuffix("+00:00"), f"{manifest.size_bytes / 1e6:,.1f}"
        table.add_row(
            path.name, str(step), written, str(facts.world["ranks"]), size, facts.versions["torch"], mark
        )
    for path in sorted(folder.glob(f"{generations.REFUSED}*")):
        table.add_row(path.name, "", "", "", "", "", "refused at a resume; `prune` removes it")
    for path in sorted(folder.glob(f"{generations.WRITING}*")):
        table.add_row(path.name, "", "", "", "", "", "unfinished, or being written")
    if table.row_count:
        _console().print(table)
    else:
        typer.echo(f"no checkpoint in {folder}")
    for reason in damaged:
        typer.secho(f"damaged: {reason}", fg="red")
    if damaged:
        raise typer.Exit(1)


@checkpoint_app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help=_EITHER)],
    *,
    everything: Annotated[bool, typer.Option("--all", help="every checkpoint of the run")] = False,
    root: Annotated[
        bool, typer.Option("--root", help="print the state's root too, which takes as long again")
    ] = False,
) -> None:
    """Read every byte and compare it with what was written; exit status 1 when something differs."""
    import time

    from fullweight.checkpoint import generations
    from fullweight.checkpoint.manifest import CorruptError, verify
    from fullweight.evidence.state_root import stored_root

    paths = [p for _, p in generations.listed(_folder(path))] if everything else [_generation(path)]
    failed = False
    for one in paths:
        began = time.perf_counter()
        try:
            found = verify(one)
        except CorruptError as error:
            failed = True
            typer.secho(f"damaged: {error}", fg="red")
            continue
        size, seconds = found.manifest.size_bytes, time.perf_counter() - began
        rate = f"{size / 1e6:,.1f} MB in {seconds:.2f} s"
        typer.echo(f"intact: {one}, step {found.step}, {rate}, manifest SHA-256 {found.sha256}")
        if root:
            typer.echo(f"  state root {stored_root(found).root}")
    if not paths:
        raise CheckpointError(f"no checkpoint in {_folder(path)}")
    if failed:
        raise typer.Exit(1)


@checkpoint_app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(help=_EITHER)],
    second: Annotated[Path, typer.Argument(help=_EITHER)],
    *,
    limit: Annotated[int, typer.Option(min=1, help="tensors to show, those that differ most first")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all differences here")] = None,
) -> None:
    """Say which tensors and settings differ and by how much; exit status 1 when the states are not equal."""
    import json
    from dataclasses import asdict

    from fullweight.checkpoint.compare import compare
    from fullweight.checkpoint.manifest import verify

    comparison = compare(verify(_generation(first)), verify(_generation(second)))
    if json_file is not None:
        write_text(json_file, json.dumps(asdict(comparison), indent=2) + "\n")
    _print_comparison(comparison, limit, _console())
    if not comparison.same_state:
        raise typer.Exit(1)


@checkpoint_app.command("prune")
def prune_command(
    run: Annotated[Path, typer.Argument(help=_RUN)],
    *,
    keep: Annotated[int, typer.Option(min=1, help="newest checkpoints to keep")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """Remove old, refused and unfinished checkpoints; the newest one that verifies always stays."""
    import shutil

    from fullweight.checkpoint import generations

    folder = _folder(run)
    with generations.locked(folder):
        good = _newest_intact(folder)
        old = generations.removable(folder, keep, good) if good else []
        aside = [p for sign in (generations.REFUSED, generations.WRITING) for p in sorted(folder.glob(f"{sign}*"))]
        for path in [*old, *aside]:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
            if not dry_run:
                generations.remove(path) if path in old else shutil.rmtree(path)
    if good is None:
        raise CheckpointError(f"no checkpoint in {folder} is intact, so none was removed; see `verify --all`")
    typer.echo(f"kept {', '.join(p.name for _, p in generations.listed(folder) if p not in old)}")


def _newest_intact(folder: Path) -> Path | None:
    from fullweight.checkpoint import generations
    from fullweight.checkpoint.manifest import CorruptError, verify

    for _, path in reversed(generations.listed(folder)):
        try:
            return verify(path).path
        except CorruptError as error:
            typer.secho(f"damaged: {error}", fg="red")
    return None


def _print_comparison(comparison: Comparison, limit: int, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    for name, (a, b) in comparison.facts.items():
        console.print(Text(f"{name}: {a} -> {b}"))
    differing = sorted(comparison.tensors, key=lambda d: (d.note is None, -d.relative, d.name))
    console.print(Text(f"{len(differing)} of {comparison.num_tensors} tensors differ"))
    if not differing:
        return
    table = Table(box=None)
    for title in ("tensor", "elements changed", "largest", "relative"):
        left = title == "tensor"
        table.add_column(title, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for d in differing[:limit]:
        if d.note is not None:
            table.add_row(d.name, d.note, "", "")
            continue
        share = f"{d.num_changed:,} of {d.num_elements:,}"
        table.add_row(d.name, share, f"{d.max_absolute:.3g}", f"{d.relative:.3g}")
    console.print(table)
    if len(differing) > limit:
        console.print(Text(f"and {len(differing) - limit} more: --limit, or --json for all"))


def _folder(run: Path) -> Path:
    """The checkpoint folder of a run."""
    from fullweight.train.run_folder import RunFolder

    folder = RunFolder(run)
    folder.require()
    return folder.checkpoints


def _generation(path: Path) -> Path:
    """A checkpoint named directly, or a run's newest."""
    from fullweight.checkpoint import generations
    from fullweight.checkpoint.manifest import NAME
    from fullweight.train.run_folder import RunFolder

    if RunFolder(path).config.is_file():
        return generations.newest(RunFolder(path).checkpoints)
    if not path.is_dir():
        raise CheckpointError(f"no folder at {path}; {_GIVE}")
    if NAME.fullmatch(path.resolve().name) is None and not (path / "manifest.json").is_file():
        raise CheckpointError(f"{path} is neither a run nor a checkpoint; {_GIVE}")
    return path


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True)
