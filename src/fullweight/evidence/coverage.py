"""Coverage: the proof, tensor by tensor and expert by expert, that a run trained every parameter.

Measured from a saved generation, not during steps. Two sources. What gradients reached: an optimiser's moments
begin at zero and only gradients move them, so an element whose moments are not zero had a gradient; the moments
are part of the exact state, so this holds over skipped steps, resumes and other numbers of ranks, and costs a step
nothing. Bits accumulated in the step would be a pass over all gradients, and an eighth of a byte a parameter, in
every run, for elements that moments forget: one without a gradient for some 1,400 steps (AdamW, beta2 0.95) or
1,700 (Muon) decays to zero, and squares of gradients below 1e-23 vanish (AdamW's first moment still has those of
the last hundreds of steps). So the share is a lower bound of what was ever reached. What can go without gradients
for so long, rows of the embedding and experts, is counted exactly in the state: tokens by vocabulary row and
tokens by layer and expert. How far weights moved: the generation's masters beside the first weights
(`first_weights.py`).

Tensors are streamed, each with a flag for every element and its first weights: memory is that of one tensor, not
of the model. Published names throughout; the elements of all parameters together are the config's parameter count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.export import as_stored
from fullweight.checkpoint.folder import PublishedFolder, row_chunks
from fullweight.checkpoint.manifest import Generation
from fullweight.checkpoint.plan import ExportFormat, Output, make_plan
from fullweight.checkpoint.published import PublishedTensor, published_tensors
from fullweight.checkpoint.source import SourceForm
from fullweight.core.errors import CheckpointError
from fullweight.evidence import merkle
from fullweight.evidence.first_weights import FirstWeights
from fullweight.evidence.state_root import leaf
from fullweight.evidence.tensor_coverage import AsStored, TensorCoverage, cover
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import Part, stacks

ROUTED, SEEN = "coverage.routed", "coverage.seen"
"""Names in a training state: tokens [MoE layers, experts] and [vocabulary] int64, of all applied steps."""
COUNTED_FROM = "counted_from"
"""Key of a state's position: the step after which those tokens were counted; 0 for a whole run."""

Progress = Callable[[str, int], None]
"""Told the name of a tensor of ours and its bytes, once it was measured."""


@dataclass(frozen=True)
class Buffer:
    """A published tensor that is no parameter: a router's bias, moved by a rule, or a hash table."""

    name: str
    elements: int
    trains: bool
    changed: int | None

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "elements": self.elements, "trains": self.trains, "changed": self.changed}


@dataclass
class Coverage:
    """All that was measured of a generation; `coverage_report.py` makes sums, findings and a verdict of it."""

    generation: Generation
    config: DeepSeekV4Config
    first: FirstWeights
    export_format: str
    tensors: list[TensorCoverage] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    routed: Tensor | None = None  # [MoE layers, experts] int64; None: the state holds no counts
    seen: Tensor | None = None  # [vocabulary] int64
    rows_reached: Tensor | None = None  # [vocabulary] bool: rows of the embedding with a gradient
    export: list[str] | None = None  # tensors exported with other values than these weights'; None: no export
    export_first: int = 0  # how many of those are what the run began with
    export_error: str | None = None  # why the exported folder is no model
    first_as_recorded: bool | None = None  # whether the first weights have the recorded root; None: not compared

    @property
    def counted_from(self) -> int:
        """The step after which `routed` and `seen` were counted."""
        return int(self.generation.manifest.facts.position.get(COUNTED_FROM, 0))

    @property
    def num_parameters(self) -> int:
        """What the config says, MTP included."""
        return self.config.num_parameters(mtp=True)


def measure(
    generation: Generation,
    first: FirstWeights,
    *,
    trained: frozenset[str] | None = None,
    form: ExportFormat = "bfloat16",
    source: SourceForm | None = None,
    exported: Path | None = None,
    weights_root: str | None = None,
    progress: Progress | None = None,
) -> Coverage:
    """Measure a verified generation in one process, without building a model.

    `trained` are our names of what the recipe trains, router biases among them (None: everything); `form` and
    `source` are the run's export; `exported` is a folder of it, compared value by value; `weights_root` is the
    root of the first weights in the run's manifest. Where `first` has no reader, changes are None. Raises
    CheckpointError when the generation is not of its config's model.
    """
    config = DeepSeekV4Config.from_published(generation.manifest.facts.model)
    stored = store.contents(generation)
    parts = _parts(config)
    _check_shapes(generation, stored, config)
    outputs = _outputs(config, form, source)
    found = Coverage(generation, config, first, form)
    reader = _Reader(generation, stored, first)
    for name in (n for n in (ROUTED, SEEN) if n in stored):
        setattr(found, name.rpartition(".")[2], reader.plain(name))
    exports, leaves = None if outputs is None else _open_export(found, exported), list[bytes]()
    try:
        for ours, now, before, reached in reader.read(sorted(parts)):
            trains = trained is None or ours in trained
            if weights_root is not None and before is not None:
                leaves.append(leaf(f"model.{ours}", before.to(now.dtype)))
            for part in parts[ours]:
                pieces = [_piece(t, part) for t in (now, before, reached)]
                _take(found, part.name, pieces, trains, outputs, source)
                if exports is not None:
                    assert outputs is not None
                    _compare_export(found, exports, outputs[part.name], pieces, source)
            if progress is not None:
                progress(ours, now.numel() * now.element_size())
    finally:
        if exports is not None:
            exports.close()
    if leaves:
        found.first_as_recorded = merkle.root(leaves) == weights_root
    total = sum(t.sums.elements for t in found.tensors)
    if total != found.num_parameters:
        raise CheckpointError(f"{generation.path} holds {total:,} parameters, its config {found.num_parameters:,}")
    order = {tensor.name: i for i, tensor in enumerate(published_tensors(config))}
    found.tensors.sort(key=lambda t: order[t.name])
    found.buffers.sort(key=lambda b: order[b.name])
    return found


def is_parameter(name: str) -> bool:
    """Whether a published tensor is a parameter, and not a router's bias or a hash table."""
    return not name.endswith((".gate.bias", ".tid2eid"))


class _Reader:
    """Whole tensors of a generation with their moments and first weights."""

    def __init__(self, generation: Generation, stored: Mapping[str, store.Stored], first: FirstWeights) -> None:
        self.generation, self.stored, self.first = generation, stored, first
        self.moments: dict[str, list[str]] = {}
        for name, entry in stored.items():
            kind, _, rest = name.partition(".")
            ours, _, _ = rest.partition(".")[2].rpartition(".")
            # the counter of steps has no dimension
            if kind == "optimizer" and f"model.{ours}" in stored and entry.shape == self._shape(ours):
                self.moments.setdefault(ours, []).append(name)

    def plain(self, name: str) -> Tensor:
        return dict(store.stream(self.generation, [name]))[name]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
        """(name, now, first weights, whether moments are not zero), one after the other."""
        ordered = [held for name in names for held in (*self.moments.get(name, []), f"model.{name}")]
        reached: Tensor | None = None
        for held, tensor in store.stream(self.generation, ordered):
            if held.startswith("optimizer."):
                reached = tensor != 0 if reached is None else reached.logical_or_(tensor != 0)
                continue
            name, first = held.removeprefix("model."), None
            if self.first.reader is not None:
                first = self.first.reader.read({name: tuple(tensor.shape)})[name]
            yield name, tensor, first, reached
            reached = None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.stored[f"model.{name}"].shape


def _parts(config: DeepSeekV4Config) -> dict[str, list[Part]]:
    """The published parts of each of our tensors, by our name."""
    found = {stack.ours: stack.places() for stack in stacks(config)}
    stacked = {part.name for parts in found.values() for part in parts}
    for tensor in published_tensors(config):
        if tensor.name not in stacked:
            found[tensor.name] = [Part(tensor.name, tensor.shape)]
    return found


def _piece(tensor: Tensor | None, part: Part) -> Tensor | None:
    if tensor is None:
        return None
    matrix = tensor if part.expert is None else tensor[part.expert]
    return matrix[part.row : part.row + part.shape[0]]


def _check_shapes(generation: Generation, stored: Mapping[str, store.Stored], config: DeepSeekV4Config) -> None:
    """Raise CheckpointError unless the model's tensors, and the counts, are those of the config."""
    expected = {f"model.{stack.ours}": stack.shape for stack in stacks(config)}
    stacked = {name for stack in stacks(config) for name in stack.names()}
    expected |= {f"model.{t.name}": t.shape for t in published_tensors(config) if t.name not in stacked}
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    counts = {ROUTED: (blocks, config.n_routed_experts), SEEN: (config.vocab_size,)}
    held = {name: entry.shape for name, entry in stored.items() if name.startswith("model.") or name in counts}
    for name in sorted(expected.keys() | held.keys()):
        wanted = (expected | counts).get(name)
        if wanted != held.get(name):
            found, due = (("nothing" if s is None else list(s)) for s in (held.get(name), wanted))
            raise CheckpointError(f"{generation.path} holds {found} as {name}, and its config's model has {due}")


def _outputs(config: DeepSeekV4Config, form: ExportFormat, source: SourceForm | None) -> dict[str, Output] | None:
    """How the export stores each published tensor; None where only the source would say, and is not there."""
    if form == "source" and source is None:
        return None
    plan = make_plan(config, form, "published", source)
    return {o.name: o for outputs in plan.outputs.values() for o in outputs if o.name == o.parts[0].name}


def _take(
    found: Coverage,
    name: str,
    pieces: list[Tensor | None],
    trains: bool,
    outputs: Mapping[str, Output] | None,
    source: SourceForm | None,
) -> None:
    now, before, reached = pieces
    assert now is not None
    if not is_parameter(name):
        changed = None if before is None else int((now != before).sum())
        found.buffers.append(Buffer(name, now.numel(), trains and not name.endswith("tid2eid"), changed))
        return
    stored: AsStored | None = None
    if outputs is not None:
        stored = partial(_stored, outputs[name], source)
    found.tensors.append(cover(name, now, before, reached, trains, stored))
    if name == "embed.weight":
        found.rows_reached = torch.zeros(len(now), dtype=torch.bool) if reached is None else reached.any(1)


def _stored(output: Output, source: SourceForm | None, rows: Tensor, start: int) -> Tensor:
    return as_stored(output, rows, start, source)


def _open_export(found: Coverage, folder: Path | None) -> PublishedFolder | None:
    if folder is None:
        return None
    try:
        exports = PublishedFolder(folder)
    except ValueError as error:  # a CheckpointError, or a ConfigError of its config.json
        found.export_error = str(error)
        return None
    found.export = []
    return exports


def _compare_export(
    found: Coverage,
    exports: PublishedFolder,
    output: Output,
    pieces: list[Tensor | None],
    source: SourceForm | None,
) -> None:
    """Note a tensor whose exported values are not what these weights give, and whether they are the first ones."""
    now, before, _ = pieces
    assert now is not None
    assert found.export is not None
    if not bool(torch.isfinite(now).all()):
        return
    exported = partial(exports.read, output.name)
    if not _equal(exported, now, output, source):
        found.export.append(output.name)
        found.export_first += before is not None and _equal(exported, before, output, source)


def _equal(
    exported: Callable[[int, int], Tensor], tensor: Tensor, output: Output, source: SourceForm | None
) -> bool:
    """Whether the export holds, value by value, what it would hold of a tensor."""
    for start, stop in row_chunks(tuple(tensor.shape), 0, tensor.shape[0]):
        rows = tensor[start:stop] if tensor.dtype == torch.int64 else tensor[start:stop].float()
        if not torch.equal(exported(start, stop).double(), as_stored(output, rows, start, source).double()):
            return False
    return True


def published_parameters(config: DeepSeekV4Config) -> list[PublishedTensor]:
    """The published tensors that are parameters; their elements add up to `num_parameters(mtp=True)`."""
    return [tensor for tensor in published_tensors(config) if is_parameter(tensor.name)]
