"""The final weights of a run under the published names, written a few rows at a time from wherever they are held.

Rank 0 writes beside the export's place and renames; the other ranks send it the rows that it asks for, so no rank
holds a second model. Where the run began from a published checkpoint its form was kept with the run, and scales of
blocks that training did not change are used again. Running it again (a run interrupted here is resumed at its last
step) writes nothing that is already whole; an export of an earlier step is replaced.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from fullweight.checkpoint.export import ModelWeights, unfinished, write_checkpoint
from fullweight.checkpoint.gather import WholeTensors
from fullweight.checkpoint.imported import open_form
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.receipt import RECEIPT
from fullweight.checkpoint.source import SourceForm
from fullweight.core.crash import crash_point
from fullweight.train.assemble import Run
from fullweight.train.config import ExportSection
from fullweight.train.run_folder import RunFolder


def export(run: Run) -> None:
    """Write weights, config.json, tokenizer and receipt, unless done; all ranks together."""
    settings = run.config.export
    if not settings.enabled or run.ranks.broadcast(_origin(run.folder.export) == _state(run)):
        return
    tensors = {n: t for n, t in get_model_state_dict(run.model).items() if isinstance(t, Tensor)}
    whole = WholeTensors(tensors, Peers())
    if not run.ranks.is_main:
        crash_point("export")

    def write_tokenizer(folder: Path) -> None:
        run.tokenizer.save(folder)
        crash_point("export")

    def write() -> None:
        form = kept_form(settings, run.folder)
        clear(run.folder)
        try:
            write_checkpoint(
                ModelWeights(whole, run.architecture),
                run.architecture,
                run.folder.export,
                settings.format,
                origin=_state(run),
                source=form,
                write_more=write_tokenizer,
            )
        finally:
            if form is not None:
                form.close()

    whole.drive(write)


def kept_form(settings: ExportSection, folder: RunFolder, sealed: str | None = None) -> SourceForm | None:
    """The form that was kept when the run began, verified; None where there is none or an export needs none.

    `sealed` is the digest that the run's checkpoints repeat. Raises CheckpointError when it is damaged, or missing
    and needed.
    """
    if not settings.enabled or (settings.format != "source" and not folder.source.is_dir()):
        return None
    return open_form(folder.source, sealed)


def clear(folder: RunFolder) -> None:
    """Remove an earlier export and what killed ones left: its name first, so that no half of it is ever found."""
    final = folder.export
    stale = final.with_name(f".{final.name}.writing-0")
    for path in unfinished(final):
        shutil.rmtree(path)
    if final.is_dir():
        final.rename(stale)
        shutil.rmtree(stale)


def _state(run: Run) -> str:
    return f"the model of this run after step {run.state.step}, as {run.config.export.format}"


def _origin(export: Path) -> str | None:
    """What the receipt of an export says that it is of; None where there is no export."""
    try:
        found = json.loads((export / RECEIPT).read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)
