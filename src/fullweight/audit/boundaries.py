"""What passed between the pieces of a model in a step of a run, read back and held against the ledger.

`train/boundaries.py` writes a folder a step. Here its files are found, checked against its list and that list
against the ledger's event, put together from the ranks that wrote them, and joined: what leaves a piece must be
what enters the next one, forward and backward. Each way in which a folder can be wrong has a name (`Failure`).

`record` makes such a folder after the fact, by taking a recorded step again. No event of the ledger binds it: its
root is to be published, or to be compared with that of a second party.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fullweight.audit.again import Means, recorded_run
from fullweight.audit.recorded import Recorded
from fullweight.checkpoint.hashing import digest as file_digest
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.core.types import Batch, PackedLayout
from fullweight.data.loader import batch_digest
from fullweight.models.deepseek_v4.parts import pieces
from fullweight.parallel.mesh import Ranks
from fullweight.train.boundaries import (
    FORMAT,
    GRADIENT,
    INDEX,
    Listed,
    Stored,
    all_pieces,
    root_of,
    watching,
    write,
)
from fullweight.train.loop import one_step


class Failure(StrEnum):
    """How a repeated piece, or its files, can contradict the record. Values are stable names."""

    unbound = "boundary.unbound"  # the list's root is not the one that the ledger names
    missing = "boundary.missing"  # a listed file, or a rank's rows, are not there
    edited = "boundary.edited"  # a file is not the listed one
    damaged = "boundary.damaged"  # no boundaries can be read from it
    other_step = "boundary.other_step"  # rows, or the step it names, are not those of the ledger's line
    apart = "boundary.apart"  # what leaves a piece is not what enters the next one
    state = "state.not_the_runs"  # a kept state is not the one that the ledger names, or is damaged
    leaving = "replay.leaving"  # the piece gives something else
    loss = "replay.loss"  # the head gives another loss than the ledger's line
    entering_gradient = "replay.entering_gradient"  # the piece hands another gradient back
    parameter_gradient = "replay.parameter_gradient"  # a parameter gets another gradient
    frozen = "replay.frozen"  # the weights after the step are those before it
    weights = "replay.weights"  # another weight or router bias after the step
    moments = "replay.moments"  # another moment after the step


class Refused(Exception):  # noqa: N818 - a verdict, no error
    """A folder of boundaries is refuted before anything is repeated."""

    def __init__(self, failure: Failure, reason: str) -> None:
        super().__init__(reason)
        self.failure, self.reason = failure, reason


@dataclass(frozen=True)
class Boundary:
    """One piece in one step, all its rows. Tensors are [rows, T, ...], rows in the order of the step."""

    piece: str
    batches: tuple[Batch, ...]
    tensors: dict[str, Tensor]  # by side: what entered and left, and the gradients
    gradients: dict[str, dict[str, Any]]  # of the whole step, by parameter: norm, sha256 or null
    stood_on: dict[str, Any]  # threads, torch, processor, operations, code, axes


@dataclass(frozen=True)
class Folder:
    """The stored boundaries of one step. `bound`: whether the ledger names their root."""

    path: Path
    step: int
    files: dict[str, Listed]
    bound: bool

    @staticmethod
    def of(path: Path, recorded: Recorded) -> Folder:
        """Read the list of a folder, and hold it against the ledger. Raises Refused."""
        try:
            listing = parse_json((path / INDEX).read_bytes())
            step, files = int(listing["step"]), [Listed(**entry) for entry in listing["files"]]
            if listing["format"] != FORMAT or any(Path(f.name).name != f.name for f in files):
                raise ValueError("it is of another format")
            root = root_of(files)
        except FileNotFoundError:
            raise Refused(Failure.missing, f"{path} has no {INDEX}, the list of its files") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(Failure.damaged, f"{path / INDEX} is damaged: {error}") from None
        events = [e for e in recorded.events if e.get("what") == "boundaries" and e["step"] == step]
        if events and events[-1].get("merkle_root") != root:
            told = events[-1].get("merkle_root")
            raise Refused(Failure.unbound, f"{path} has root {root}, and the ledger names {told} for step {step}")
        return Folder(path, step, {f.name: f for f in files}, bool(events))

    def pieces(self) -> list[str]:
        """The pieces that the list names, each once."""
        return list(dict.fromkeys(name.partition(".rank-")[0] for name in self.files))

    def read(self, piece: str, ratios: Sequence[int], line: Mapping[str, Any]) -> Boundary:
        """A piece's files, whole, put together; `line` is the ledger's of the step. Raises Refused."""
        names = [name for name in self.files if name.partition(".rank-")[0] == piece]
        if not names:
            raise Refused(Failure.missing, f"{self.path} lists no file of {piece}")
        parts = [self._part(name) for name in names]
        boundary = _together(piece, parts, ratios)
        if {facts["step"] for facts, _ in parts} != {self.step} or {f["piece"] for f, _ in parts} != {piece}:
            raise Refused(Failure.other_step, f"{names[0]} says that it is of another piece or step")
        rows = hashlib.sha256(b"".join(bytes.fromhex(batch_digest(b)) for b in boundary.batches)).hexdigest()
        if rows != (told := line.get("batch", {}).get("digest")):
            reason = f"the rows of {piece} have digest {rows}, the ledger's step {self.step} was fed {told}"
            raise Refused(Failure.other_step, reason)
        return boundary

    def _part(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        path, listed = self.path / name, self.files[name]
        if not path.is_file() or path.is_symlink():
            raise Refused(Failure.missing, f"{path} is not there, and the list of the folder names it")
        if (found := file_digest(path)).sha256 != listed.sha256:
            raise Refused(Failure.edited, f"{path} has SHA-256 {found.sha256}, its list says {listed.sha256}")
        try:
            with safe_open(path, framework="pt") as stored:
                facts = parse_json((stored.metadata() or {})["boundary"].encode())
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no dict
            _check(facts, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Refused(Failure.damaged, f"{path} is no file of boundaries, or is damaged: {error}") from None
        return facts, tensors


def record(
    recorded: Recorded, step: int, chosen: Collection[str], folder: Path, ranks: Ranks, scratch: Path, means: Means
) -> Stored:
    """Take step `step` + 1 again from the kept state of `step`, and keep what passes `chosen` pieces in `folder`.

    Raises ConfigError on a piece that there is not, CheckpointError when the disk refuses, and what a replay does.
    """
    with recorded_run(recorded, step, ranks, scratch, means) as run:
        every = all_pieces(run)
        absent = [name for name in chosen if name not in every]
        if absent:
            raise ConfigError(f"there is no piece {absent[0]}; this model has {', '.join(every)}")
        with watching(run, chosen) as heard:
            one_step(run)
        stored = write(heard, run, folder)
    if stored.failure is not None:
        raise CheckpointError(f"{folder} cannot be written: {stored.failure}")
    return stored


def joints(found: Mapping[str, Boundary], num_layers: int, hc_mult: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(where, what one side has, what the other has) for each pair of neighbours in `found`.

    Behind the last layer lie the head and, where there is one, the MTP block; the gradient of what left that layer
    is the sum of theirs. What leaves the embedding enters the first layer as each of `hc_mult` streams.
    """
    with_mtp = "mtp" in found or any("ahead" in b.tensors for p, b in found.items() if p == "head")
    order = pieces(num_layers, with_mtp)
    for below, above in pairwise(order[1 : num_layers + 1]):
        if below in found and above in found:
            yield from _joint((below, "leaving"), (above, "entering"), found)
    last = f"layer-{num_layers - 1}"
    behind = [name for name in order[num_layers + 1 :] if name in found]
    if last in found:
        for name in behind:
            yield f"{last}/{name}", found[last].tensors["leaving"], found[name].tensors["entering"]
        sums = [found[n].tensors.get("entering" + GRADIENT) for n in behind]
        given = [g for g in sums if g is not None]
        if len(behind) == (2 if with_mtp else 1) and given and "leaving" + GRADIENT in found[last].tensors:
            total = given[0] if len(given) == 1 else given[0] + given[1]
            yield f"{last}/{' + '.join(behind)}, gradient", found[last].tensors["leaving" + GRADIENT], total
    if "mtp" in found and "head" in found:
        yield from _joint(("mtp", "leaving"), ("head", "ahead"), found)
    if "embedding" in found:
        yield from _embedding_joints(found, hc_mult)


def _embedding_joints(found: Mapping[str, Boundary], hc_mult: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    own = found["embedding"].tensors
    if "layer-0" in found:
        streams = own["leaving"].unsqueeze(2).repeat(1, 1, hc_mult, 1)
        yield "embedding/layer-0", streams, found["layer-0"].tensors["entering"]
        back = found["layer-0"].tensors.get("entering" + GRADIENT)
        if back is not None and "leaving" + GRADIENT in own:
            yield "embedding/layer-0, gradient", own["leaving" + GRADIENT], back.sum(2)
    if "mtp" in found and "following" in own:
        inside = torch.stack([_has_next(b) for b in found["embedding"].batches]).unsqueeze(2)
        theirs = found["mtp"].tensors
        yield "embedding/mtp", own["following"] * inside, theirs["following"]
        if "following" + GRADIENT in own and "following" + GRADIENT in theirs:
            back = theirs["following" + GRADIENT] * inside
            yield "embedding/mtp, gradient", own["following" + GRADIENT], back


def _has_next(batch: Batch) -> Tensor:
    positions = batch.layout.positions
    inside = torch.zeros_like(positions, dtype=torch.bool)
    inside[:-1] = positions[1:] == positions[:-1] + 1
    return inside


def _joint(
    below: tuple[str, str], above: tuple[str, str], found: Mapping[str, Boundary]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    here, there = found[below[0]].tensors, found[above[0]].tensors
    yield f"{below[0]}/{above[0]}", here[below[1]], there[above[1]]
    gradients = here.get(below[1] + GRADIENT), there.get(above[1] + GRADIENT)
    if gradients[0] is not None and gradients[1] is not None:
        yield f"{below[0]}/{above[0]}, gradient", gradients[0], gradients[1]


def _check(facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, KeyError or TypeError unless shapes and facts fit each other."""
    rows, part = facts["rows"], facts["slice"]
    count = int(rows["count"])
    tokens, mask = tensors["tokens"], tensors["loss_mask"]
    if (
        facts["format"] != FORMAT
        or not 0 <= rows["first"] < rows["stride"]
        or not 0 <= part["index"] < part["count"]
    ):
        raise ValueError("its facts contradict each other")
    if tokens.dtype != torch.int64 or mask.shape != tokens.shape or tokens.shape[0] != count or tokens.dim() != 2:
        raise ValueError("its tokens do not fit its rows")
    if len(facts["layouts"]) != count or any(
        sum(e["document_lengths"]) != tokens.shape[1] for e in facts["layouts"]
    ):
        raise ValueError("its documents do not fit its rows")
    here = tokens.shape[1] // part["count"]
    for name, tensor in tensors.items():
        if name not in ("tokens", "loss_mask") and (tensor.dim() < 3 or tensor.shape[:2] != (count, here)):
            raise ValueError(f"{name} does not fit its rows")
        if name.endswith(GRADIENT) and tensor.shape != tensors[name.removesuffix(GRADIENT)].shape:
            raise ValueError(f"{name} has another shape than what it is the gradient of")


def _together(
    piece: str, parts: list[tuple[dict[str, Any], dict[str, Tensor]]], ratios: Sequence[int]
) -> Boundary:
    """Rows of all data ranks in the step's order, each of its slices. Raises Refused."""
    first, like = parts[0]
    stride, slices, count = first["rows"]["stride"], first["slice"]["count"], first["rows"]["count"]
    places = {(facts["rows"]["first"], facts["slice"]["index"]): (facts, tensors) for facts, tensors in parts}
    wanted = [(row, index) for row in range(stride) for index in range(slices)]
    if absent := [place for place in wanted if place not in places]:
        reason = f"no file of {piece} has rows {absent[0][0]} of {stride}, slice {absent[0][1]} of {slices}"
        raise Refused(Failure.missing, reason)
    sides = [name for name in like if name not in ("tokens", "loss_mask")]
    try:
        whole = {
            side: torch.stack(
                [torch.cat([places[row, i][1][side] for i in range(slices)], 1) for row in range(stride)], 1
            ).flatten(0, 1)
            for side in sides
        }
        batches = [_batch(*places[row, 0], micro, ratios) for micro in range(count) for row in range(stride)]
    except (KeyError, RuntimeError, IndexError) as error:
        raise Refused(Failure.damaged, f"the files of {piece} do not fit each other: {error}") from None
    return Boundary(piece, tuple(batches), whole, first["gradients"], first["stood_on"])


def _batch(facts: dict[str, Any], tensors: dict[str, Tensor], row: int, ratios: Sequence[int]) -> Batch:
    lengths, padding = list(facts["layouts"][row]["document_lengths"]), facts["layouts"][row]["num_padding"]
    layout = PackedLayout.build(lengths[:-1] if padding else lengths, ratios, sum(lengths))
    return Batch(tensors["tokens"][row], tensors["loss_mask"][row], layout)
