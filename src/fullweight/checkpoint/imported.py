"""The receipt of weights that ranks read straight into their shards, and the form of where they came from.

Every rank hashes the bytes that it reads. Put together, the parts must cover each tensor of the model, and what
two ranks read must be the same bytes, or else the import fails: a file that changed meanwhile, or a file system
that gives two machines two contents, is no start of a run. Both are kept in the run's folder; the form's files
are sealed by one digest, which every checkpoint of the run repeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullweight.checkpoint.catalogue import few
from fullweight.checkpoint.export import new_folder, where
from fullweight.checkpoint.folder import PartRead, PublishedFolder
from fullweight.checkpoint.hashing import digest
from fullweight.checkpoint.receipt import Receipt
from fullweight.checkpoint.source import SourceForm
from fullweight.core.crash import crash_point
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.convert import stacks

_SEAL = "SHA256SUMS"


def load_receipt(path: Path, parts_by_rank: Sequence[Sequence[PartRead]]) -> Receipt:
    """The receipt of weights of the folder `path` that ranks read in those parts.

    Raises CheckpointError when a tensor was not read whole, or not alike.
    """
    ranges: dict[str, dict[tuple[int, int], tuple[str, list[int]]]] = {}
    for rank, parts in enumerate(parts_by_rank):
        for part in parts:
            found = ranges.setdefault(part.name, {}).setdefault((part.start, part.stop), (part.sha256, []))
            if found[0] != part.sha256:
                raise CheckpointError(
                    f"{path}: ranks {found[1][0]} and {rank} read other bytes of {part.name}: it changed while it "
                    "was read, or their machines do not see the same file; run again on a folder at rest"
                )
            found[1].append(rank)
    receipt = Receipt("load", "float32", "ours", str(path))
    with PublishedFolder(path) as folder:
        aside = dict.fromkeys(folder.catalogue.copies, "ignored: a copy of shared weights")
        aside |= dict.fromkeys(folder.catalogue.draft_names(), "kept aside: draft block of DSpark")
        places = {part.name: where(part, stack) for stack in stacks(folder.config) for part in stack.places()}
        owners = {s: name for name, t in folder.catalogue.tensors.items() for s in t.stored_names()}
        lacking = []
        for name, entry in folder.catalogue.entries.items():
            read = ranges.get(name, {})
            if name in owners and not _covers(read.keys(), entry.num_bytes):
                lacking.append(name)
            whole = read.get((0, entry.num_bytes))
            receipt.read.append(
                {
                    "name": name,
                    "file": folder.files[name],
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "bytes": entry.num_bytes,
                    "sha256": None if whole is None else whole[0],
                    "parts": [_part(at, *found) for at, found in sorted(read.items())],
                    "destination": aside.get(name) or places.get(owners[name], owners[name]),
                }
            )
    if lacking:
        raise CheckpointError(f"{path}: not every byte of {few(lacking)} was read into the model")
    return receipt


def keep_form(path: Path, into: Path) -> str:
    """Keep the form of the checkpoint folder `path` as the new folder `into`; returns the digest of its seal."""
    form = SourceForm.of(path)
    try:
        with new_folder(into) as staging:
            form.keep(staging)
            files = sorted(p for p in staging.rglob("*") if p.is_file())
            listed = "".join(f"{digest(p).sha256}  {p.relative_to(staging)}\n" for p in files).encode()
            (staging / _SEAL).write_bytes(listed)
            crash_point("begin.source")
    finally:
        form.close()
    return hashlib.sha256(listed).hexdigest()


def seal_of(kept: Path) -> str | None:
    """The digest of a kept form's seal; None where no form was kept."""
    try:
        return hashlib.sha256((kept / _SEAL).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def open_form(kept: Path, sealed: str | None = None) -> SourceForm:
    """The form kept in `kept`, every byte of it checked. `sealed` is the digest that checkpoints repeat.

    Raises CheckpointError naming the file that is missing or is not what was kept.
    """
    fix = "restore it from a copy of the run, or export as bfloat16 and name the source at `convert export`"
    found = seal_of(kept)
    if found is None or (sealed is not None and found != sealed):
        what = "is missing" if found is None else f"has SHA-256 {found[:12]}..., the run kept {sealed:.12}..."
        raise CheckpointError(f"{kept / _SEAL} {what}; {fix}")
    for line in (kept / _SEAL).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        try:
            same = digest(kept / name).sha256 == expected
        except OSError as error:
            raise CheckpointError(f"{kept / name} cannot be read: {error.strerror}; {fix}") from None
        if not same:
            raise CheckpointError(f"{kept / name} is not what was kept when the run began; {fix}")
    return SourceForm.kept(kept)


def _covers(ranges: Any, size: int) -> bool:
    end = 0
    for start, stop in sorted(ranges):
        if start > end:
            return False
        end = max(end, stop)
    return bool(end >= size)


def _part(at: tuple[int, int], sha256: str, ranks: list[int]) -> dict[str, Any]:
    return {"bytes": list(at), "sha256": sha256, "ranks": ranks}
