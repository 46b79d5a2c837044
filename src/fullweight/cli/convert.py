"""`fullweight convert import|export|inspect|synthesise`: published checkpoints in and out, with receipts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.bars import byte_bar
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from fullweight.checkpoint.folder import PublishedFolder
    from fullweight.checkpoint.receipt import Receipt

convert_app = typer.Typer(help="Convert checkpoints between published formats.", no_args_is_help=True)

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Imported(StrEnum):
    """What an import stores matrices in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Exported(StrEnum):
    """What an export stores matrices in; source: exactly the published form."""

    SOURCE = "source"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FP8 = "fp8"
    FP4 = "fp4"


class NameSet(StrEnum):
    """Whose names the tensors get."""

    PUBLISHED = "published"
    TRANSFORMERS = "transformers"


class Synthesised(StrEnum):
    """Layouts of releases: fp4 that of Flash and Pro, base that of the Base models."""

    FP4 = "fp4"
    FP8 = "fp8"
    BASE = "base"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@convert_app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="published checkpoint folder, any format")],
    out: Annotated[Path, typer.Argument(help="new or empty folder")],
    *,
    dtype: Annotated[Imported, typer.Option(help="bfloat16 holds every FP4 and FP8 value exactly")] = (
        Imported.BFLOAT16
    ),
) -> None:
    """Write a checkpoint's values out plainly, with what an exact export back needs and a receipt.

    Training and `fullweight.load` read published checkpoints directly; this is for tools that cannot.
    """
    from fullweight.checkpoint.export import FolderWeights, write_checkpoint
    from fullweight.checkpoint.folder import PublishedFolder
    from fullweight.checkpoint.source import SourceForm

    with PublishedFolder(source, hashing=True) as folder, _progress("import", folder):
        receipt = write_checkpoint(
            FolderWeights(folder),
            folder.config,
            out,
            dtype.value,
            origin=str(source),
            operation="import",
            keep_source=SourceForm.of_folder(folder),
            write_more=_copy_tokenizer(source),
        )
    _say(receipt, out)


@convert_app.command("export")
def export_command(
    weights: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder that has an export")],
    out: Annotated[Path, typer.Argument(help="new or empty folder")],
    *,
    form: Annotated[Exported, typer.Option("--format", help="what matrices are stored in")] = Exported.SOURCE,
    names: Annotated[NameSet, typer.Option(help="the published names, or those of transformers")] = (
        NameSet.PUBLISHED
    ),
    source: Annotated[
        Path | None,
        typer.Option(
            help="published checkpoint (or an import of it) whose scales and form to use; a run kept its own"
        ),
    ] = None,
) -> None:
    """Write a checkpoint in another format, or back in the form in which its source was published."""
    from fullweight.checkpoint.export import FolderWeights, write_checkpoint
    from fullweight.checkpoint.folder import PublishedFolder
    from fullweight.checkpoint.imported import open_form
    from fullweight.checkpoint.source import SOURCE, SourceForm
    from fullweight.train.run_folder import RunFolder

    run, found = RunFolder(weights), None if source is None else SourceForm.of(source)
    if run.ledger.is_file():
        weights = run.export
        if found is None and run.source.is_dir():
            found = open_form(run.source)
    with PublishedFolder(weights, hashing=True) as folder, _progress("export", folder):
        if found is None and (folder.catalogue.is_quantised or (weights / SOURCE).is_dir()):
            found = SourceForm.of(weights)
        if form is Exported.SOURCE and found is None:
            raise ConfigError(
                f"{weights} holds plain weights and does not say how they were published; name the published "
                "checkpoint with --source, or choose another --format"
            )
        receipt = write_checkpoint(
            FolderWeights(folder),
            folder.config,
            out,
            form.value,
            origin=str(weights),
            names=names.value,
            source=found,
            write_more=_copy_tokenizer(weights),
        )
    _say(receipt, out)


@convert_app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder")],
    *,
    receipt: Annotated[
        Path | None, typer.Option(help="hash every tensor and compare with what this receipt says was written")
    ] = None,
) -> None:
    """Check a checkpoint's files, names, shapes and dtypes, and say what it holds. Reads headers alone."""
    from rich.console import Console
    from rich.table import Table

    from fullweight.checkpoint.folder import PublishedFolder
    from fullweight.checkpoint.receipt import compare

    with PublishedFolder(folder, hashing=receipt is not None) as opened:
        console = Console()
        entries = opened.catalogue.entries
        payload = sum(entry.num_bytes for entry in entries.values())
        console.print(f"{folder}: {len(entries):,} tensors, {payload:,} bytes in {len(opened.readers)} files")
        table = Table(box=None, title="how the model's tensors are stored", title_justify="left")
        for title in ("storage", "scales", "tensors", "bytes"):
            table.add_column(title, justify="left" if title in ("storage", "scales") else "right")
        for row in _storage_rows(opened):
            table.add_row(*row)
        console.print(table)
        if opened.catalogue.drafts:
            console.print(f"kept aside: {len(opened.catalogue.draft_names()):,} tensors of DSpark draft blocks")
        if opened.catalogue.copies:
            console.print(f"ignored: {len(opened.catalogue.copies)} copies of the embedding or head")
        console.print("nothing missing, nothing left over")
        if receipt is not None:
            with _progress("compare", opened):
                count = compare(opened, receipt)
            console.print(f"all {count:,} tensors are those of {receipt}")


@convert_app.command("synthesise")
def synthesise_command(
    config: Annotated[Path, typer.Argument(help="config.json of a DeepSeek-V4 model, published form")],
    out: Annotated[Path, typer.Argument(help="new or empty folder")],
    *,
    layout: Annotated[Synthesised, typer.Option(help="of which release")] = Synthesised.FP4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write made-up weights in a release's exact layout, for tests and rehearsals without a download."""
    from fullweight.checkpoint.published import LAYOUTS, totals
    from fullweight.checkpoint.synthetic import write_synthetic
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config

    architecture = DeepSeekV4Config.from_file(config)
    found = totals(architecture, LAYOUTS[layout.value])
    with byte_bar("synthesise", found.payload_bytes) as advance:
        write_synthetic(architecture, out, layout.value, seed, advance)
    typer.echo(f"{out}: {found.tensors:,} tensors, {found.payload_bytes:,} bytes, seed {seed}")


def _storage_rows(opened: PublishedFolder) -> Iterator[tuple[str, str, str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for stored in opened.catalogue.tensors.values():
        key = (stored.storage, stored.scale_dtype or "")
        counts[key] += 1
        sizes[key] += sum(opened.catalogue.entries[name].num_bytes for name in stored.stored_names())
    for (storage, scales), count in sorted(counts.items()):
        yield storage, scales, f"{count:,}", f"{sizes[storage, scales]:,}"


@contextmanager
def _progress(what: str, folder: PublishedFolder) -> Iterator[None]:
    """A bar of the bytes read from a folder."""
    with byte_bar(what, sum(entry.num_bytes for entry in folder.catalogue.entries.values())) as advance:
        folder.on_read = advance
        yield


def _copy_tokenizer(origin: Path) -> Callable[[Path], None]:
    def copy(into: Path) -> None:
        for name in _TOKENIZER:
            if (origin / name).is_file():
                (into / name).write_bytes((origin / name).read_bytes())

    return copy


def _say(receipt: Receipt, out: Path) -> None:
    from fullweight.checkpoint.receipt import RECEIPT

    totals = receipt.as_json()["totals"]
    read, written = totals["read"], totals["written"]
    typer.echo(
        f"read {read['tensors']:,} tensors, {read['bytes']:,} bytes; "
        f"wrote {written['tensors']:,} tensors, {written['bytes']:,} bytes"
    )
    if totals["reused_blocks"] or totals["rule_blocks"]:
        typer.echo(
            f"blocks: {totals['reused_blocks']:,} exact under the source's scale, "
            f"{totals['rule_blocks']:,} by the rule"
        )
    aside = [e["name"] for e in receipt.read if str(e["destination"]).startswith("kept aside")]
    if aside:
        typer.echo(f"kept aside: {len(aside):,} tensors of DSpark draft blocks")
    if receipt.left_out:
        typer.echo(f"left out: {len(receipt.left_out):,} tensors ({receipt.left_out[0]['why']})")
    typer.echo(f"rounding changed values in {totals['inexact_tensors']:,} tensors")
    typer.echo(f"nothing missing, nothing left over; receipt: {out / RECEIPT}")
