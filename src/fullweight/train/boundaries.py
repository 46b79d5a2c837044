"""What passes between the pieces of a model in one step, kept so that a piece can be repeated alone.

Pieces are the embedding, each layer, the MTP block and the head. While a step is watched, the model tells what
enters and leaves each chosen piece, forward and backward, of every row (`DeepSeekV4.watch`). Every rank writes a
safetensors file for each piece that it ran, with the rows that it ran it on; rank 0 then lists the files with
their SHA-256, and one Merkle root over that list goes into the ledger. All files are on the disk by then, so who
reads the ledger knows that they were fixed before anybody drew a piece to look at. `audit/layer.py` repeats.

Watched is the training step itself: nothing is computed twice, and bits are those of any other step. What passes
is copied to the host, 2 (forward and backward) x 2 (sides) x hidden size x streams x bytes of the compute type for
each layer and token.

Left out: writing in the background; a folder that all ranks share is needed, as for checkpoints.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fullweight.checkpoint.hashing import digest as file_digest
from fullweight.checkpoint.peers import Peers
from fullweight.core import durable
from fullweight.core.tensors import local_part
from fullweight.core.types import Batch
from fullweight.devices import find
from fullweight.evidence import merkle
from fullweight.evidence.state_root import digest
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.parts import pieces
from fullweight.optim.clip import global_norm
from fullweight.parallel.engine import Engine, Mark, Shares, Weigh
from fullweight.train import code
from fullweight.train.assemble import Run
from fullweight.train.run_folder import write_json

FORMAT = 1
INDEX = "index.json"
GRADIENT = "_gradient"
"""What the name of a gradient ends with, behind the name of the tensor that it is of."""


@dataclass(frozen=True)
class Listed:
    """A stored file of a folder of boundaries."""

    name: str
    size_bytes: int
    sha256: str

    @property
    def leaf(self) -> bytes:
        """What stands for it in the root, as for data files in the manifest."""
        return f"{self.sha256} {self.size_bytes} {self.name}".encode()


@dataclass(frozen=True)
class Stored:
    """What one step left."""

    folder: Path
    step: int
    files: tuple[Listed, ...]  # in order of names
    seconds: float
    failure: str | None = None

    @property
    def root(self) -> str:
        return root_of(self.files)

    def event(self) -> dict[str, Any]:
        """For the ledger."""
        if self.failure is not None:
            return {"what": "boundaries_failed", "reason": self.failure, "seconds": self.seconds}
        return {
            "what": "boundaries",
            "folder": self.folder.name,
            "files": len(self.files),
            "size_bytes": sum(f.size_bytes for f in self.files),
            "merkle_root": self.root,
            "seconds": self.seconds,
        }


def root_of(files: Sequence[Listed]) -> str:
    """The root over files in order of their names."""
    return merkle.root(f.leaf for f in files)


@dataclass
class Heard:
    """What the chosen pieces were told to pass on: by name, one tensor a row, on the host."""

    pieces: Collection[str]
    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    gradients: dict[str, dict[str, Any]] = field(default_factory=dict)  # of parameters, by full name

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """As `model.Watch`. What goes on is a copy, so that its gradient is that of this side of the cut alone."""
        if name.rpartition(".")[0] not in self.pieces or not torch.is_grad_enabled():
            return tensor
        passing, rows = tensor.clone(), self.values.setdefault(name, {})
        row = len(rows)  # every schedule runs a piece's forward passes in the order of the micro-batches
        rows[row] = passing.detach().to("cpu", copy=passing.device.type != "cpu")
        if passing.requires_grad:
            passing.register_hook(partial(self._gradient, name + GRADIENT, row))
        return passing

    def _gradient(self, name: str, row: int, gradient: Tensor) -> None:
        self.values.setdefault(name, {})[row] = gradient.detach().to("cpu", copy=True)

    def stacked(self, piece: str) -> dict[str, Tensor]:
        """A piece's tensors [rows, ...] by side; zeros for the gradient of a row that no loss reached."""
        found = {}
        for name, rows in self.values.items():
            owner, _, side = name.rpartition(".")
            if owner == piece:
                like = next(iter(rows.values()))
                every = [rows.get(r, torch.zeros_like(like)) for r in range(len(self.batches))]
                found[side] = torch.stack(every)
        return found


@dataclass(frozen=True)
class _Listening:
    """The engine of a step that is watched: afterwards it looks at the gradients, before they are clipped."""

    engine: Engine
    model: DeepSeekV4
    heard: Heard

    def run(self, batches: Sequence[Batch], weigh: Weigh, mark: Mark) -> Shares:
        shares = self.engine.run(batches, weigh, mark)
        self.heard.batches = list(batches)
        self.heard.gradients = {
            name: gradient_facts(p.grad)
            for name, p in self.model.named_parameters()
            if p.grad is not None and piece_of(name) in self.heard.pieces
        }
        return shares

    def evaluate(self, batches: Sequence[Batch]) -> Shares:
        return self.engine.evaluate(batches)


@contextmanager
def watching(run: Run, chosen: Collection[str]) -> Iterator[Heard]:
    """Within it a step of the run tells what passes through `chosen` pieces; for one step, without evaluations."""
    heard, engine = Heard(frozenset(chosen)), run.engine
    run.model.watch, run.engine = heard, _Listening(engine, run.model, heard)
    try:
        yield heard
    finally:
        run.model.watch, run.engine = None, engine


def chosen_pieces(run: Run) -> tuple[str, ...] | None:
    """What of the next step the recipe asks to be kept, None if nothing."""
    settings, step = run.config.boundaries, run.state.step
    if settings.every is None or step == 0 or step % settings.every:
        return None
    return settings.chosen(run.architecture)


def write(heard: Heard, run: Run, folder: Path) -> Stored:
    """Write what was heard of the step that was just taken into `folder`, anew; all ranks together.

    A disk that refuses is told in the result, the same on all ranks.
    """
    began, peers, ranks = time.perf_counter(), Peers(), run.ranks
    failure = None
    try:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    except OSError as error:
        failure = str(error)
    failure = ranks.broadcast(failure)
    mine: list[Listed] = []
    if failure is None:
        try:
            mine = _write_own(heard, run, folder)
        except OSError as error:
            failure = str(error)
    together = peers.gather((mine, failure))
    failure = next((reason for _, reason in together if reason is not None), None)
    files = tuple(sorted((f for listed, _ in together for f in listed), key=lambda f: f.name))
    if failure is None and ranks.is_main:
        try:
            listing = {"format": FORMAT, "step": run.state.step, "files": [vars(f) for f in files]}
            write_json(folder / INDEX, listing)
        except OSError as error:
            failure = str(error)
    failure = ranks.broadcast(failure)
    return Stored(folder, run.state.step, files, time.perf_counter() - began, failure)


def _write_own(heard: Heard, run: Run, folder: Path) -> list[Listed]:
    ranks, found = run.ranks, []
    shared = {
        "format": FORMAT,
        "step": run.state.step,
        "rows": {"first": ranks.data_rank, "stride": ranks.data_size, "count": len(heard.batches)},
        "slice": {"index": ranks.layout.slice_index(ranks.rank), "count": ranks.layout.num_slices},
        "layouts": [
            {"document_lengths": list(b.layout.document_lengths), "num_padding": b.layout.num_padding}
            for b in heard.batches
        ],
        "stood_on": standing(run.model.ops.name) | {"axes": ranks.layout.axes()},
    }
    rows = {
        "tokens": torch.stack([b.tokens.cpu() for b in heard.batches]),
        "loss_mask": torch.stack([b.loss_mask.cpu() for b in heard.batches]),
    }
    for piece in sorted({name.rpartition(".")[0] for name in heard.values}):
        gradients = {name: facts for name, facts in heard.gradients.items() if piece_of(name) == piece}
        facts = shared | {"piece": piece, "gradients": gradients}
        path = folder / f"{piece}.rank-{ranks.rank}.safetensors"
        tensors = {name: t.contiguous() for name, t in (rows | heard.stacked(piece)).items()}
        durable.write(path, save(tensors, {"boundary": json.dumps(facts)}))
        size = file_digest(path)
        found.append(Listed(path.name, size.size_bytes, size.sha256))
    return found


def gradient_facts(gradient: Tensor) -> dict[str, Any]:
    """Norm of a whole gradient, and its SHA-256 where it lies whole on this rank; ranks that share it together."""
    if local_part(gradient) is gradient:
        return {"norm": gradient.double().norm().item(), "sha256": digest(gradient.cpu())}
    return {"norm": global_norm([gradient]).item(), "sha256": None}


def piece_of(parameter: str) -> str:
    """The piece that a parameter or buffer is of.

    >>> [piece_of(name) for name in ("embed.weight", "layers.3.ffn.gate.bias", "mtp.0.norm.weight", "hc_head_fn")]
    ['embedding', 'layer-3', 'mtp', 'head']
    """
    first, _, rest = parameter.partition(".")
    return {"embed": "embedding", "layers": f"layer-{rest.partition('.')[0]}", "mtp": "mtp"}.get(first, "head")


def all_pieces(run: Run) -> tuple[str, ...]:
    """Every piece of the run's model."""
    architecture = run.architecture
    return pieces(architecture.num_hidden_layers, architecture.num_nextn_predict_layers > 0)


def standing(operations: str) -> dict[str, Any]:
    """What this process stands on, as far as it decides the bits of one piece."""
    return {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "processor": find("cpu").chip(),
        "operations": operations,
        "source_sha256": code.identity()["source_sha256"],
    }
