"""What enters and leaves single layers in one micro-batch of a run, kept so that each can be checked alone.

From the state after a step, the next step's first row goes forward and backward as in training. For each chosen
layer a safetensors file keeps the streams that enter and leave it [T, n, d], the gradients of both, and the row's
tokens; in its metadata, what the layer's auxiliary losses count in the step's total, and of each gradient that the
layer's parameters got: its norm and its SHA-256. `layer.py` repeats one layer from its file and the kept state.

What leaves a layer enters the next one, bit for bit, so files of neighbours hold each other. Made after the fact
by who has the whole model; a file's SHA-256 is what to publish. Left out: layouts of several ranks, the MTP block,
the embedding and the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fullweight.audit.again import Means, recorded_run
from fullweight.audit.recorded import Recorded
from fullweight.checkpoint.hashing import FileDigest
from fullweight.checkpoint.hashing import digest as file_digest
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.core.types import PackedLayout
from fullweight.evidence.state_root import digest
from fullweight.parallel.mesh import Ranks
from fullweight.train.step import global_counts, weighted_total

AUXILIARY = ("indexer", "balance")
_TENSORS = ("entering", "leaving", "entering_gradient", "leaving_gradient", "tokens")


@dataclass(frozen=True)
class Boundary:
    """One layer in one micro-batch. Streams and their gradients are [T, n, d], tokens [T] int64."""

    layer: int
    generation: str  # the kept state it was computed from
    manifest_sha256: str  # of that state
    row: str  # digest of the row, as in no other place
    layout: dict[str, Any]  # document lengths with the padding last, and the padding
    weights: dict[str, float]  # of the auxiliary losses' sums in the step's total
    gradients: dict[str, dict[str, Any]]  # by parameter: norm, sha256
    stood_on: dict[str, Any]  # threads, torch, operations, code
    tensors: dict[str, Tensor]

    def packed(self, ratios: Sequence[int]) -> PackedLayout:
        """The row's layout."""
        lengths, padding = list(self.layout["document_lengths"]), self.layout["num_padding"]
        return PackedLayout.build(lengths[:-1] if padding else lengths, ratios, sum(lengths))


@dataclass
class _Taken:
    """Tensors of one layer, as the pass goes by."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, block: nn.Module) -> list[Callable[[], None]]:
        return [
            block.register_forward_pre_hook(self._enter).remove,
            block.register_forward_hook(self._leave).remove,
        ]

    def _enter(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._keep("entering", arguments[0])

    def _leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._keep("leaving", output)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.detach().clone()
        if tensor.requires_grad:
            tensor.register_hook(partial(self._gradient, f"{name}_gradient"))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self.tensors[name] = gradient.detach().clone()


def record(
    recorded: Recorded, step: int, layers: Sequence[int], folder: Path, ranks: Ranks, scratch: Path, means: Means
) -> dict[Path, FileDigest]:
    """Write the files of `layers` for the first row of step `step` + 1 into `folder`; their digests.

    Raises ConfigError on a layer that there is not, or several ranks, and what a replay raises.
    """
    if ranks.size > 1:
        raise ConfigError(f"boundaries are taken by one rank, found {ranks.size}; start it without torchrun")
    with recorded_run(recorded, step, ranks, scratch, means) as (run, generation, stood_on):
        absent = [i for i in layers if not 0 <= i < len(run.model.layers)]
        if absent:
            raise ConfigError(f"there is no layer {absent[0]}; this model has 0 to {len(run.model.layers) - 1}")
        taken = {i: _Taken() for i in layers}
        removals = [remove for i, t in taken.items() for remove in t.watch(run.model.layers[i])]
        batches = [next(run.state.loader).to(ranks.device) for _ in range(run.rows_per_rank)]
        losses, counts = run.config.train.loss, global_counts(run.config.method, run.model, batches, ranks)
        run.engine.run(batches[:1], lambda sums: weighted_total(sums, counts, losses), lambda phase: None)
        for remove in removals:
            remove()
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: losses.coefficient(name) / counts[name] for name in AUXILIARY if counts.get(name)}
        found = {}
        for i in layers:
            tensors = {name: t.cpu().contiguous() for name, t in taken[i].tensors.items()}
            facts = {
                "layer": i,
                "generation": generation.path.name,
                "manifest_sha256": generation.sha256,
                "row": batches[0].digest,
                "layout": {
                    "document_lengths": list(batches[0].layout.document_lengths),
                    "num_padding": batches[0].layout.num_padding,
                },
                "weights": weights,
                "gradients": gradients_of(run.model.layers[i]),
                "stood_on": stood_on,
            }
            path = folder / f"layer-{i}.safetensors"
            save_file({**tensors, "tokens": batches[0].tokens.cpu()}, path, {"boundary": json.dumps(facts)})
            found[path] = file_digest(path)
        return found


def gradients_of(block: nn.Module) -> dict[str, dict[str, Any]]:
    """Norm and SHA-256 of every gradient of a layer's parameters, by the parameter's name within it."""
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {n: {"norm": g.double().norm().item(), "sha256": digest(g.cpu())} for n, g in found.items()}


def read(path: Path) -> Boundary:
    """A file that `record` wrote. Raises CheckpointError when it is none."""
    try:
        with safe_open(path, framework="pt") as stored:
            facts = parse_json((stored.metadata() or {})["boundary"].encode())
            tensors = {name: stored.get_tensor(name) for name in _TENSORS}
        boundary = Boundary(**facts, tensors=tensors)
        _check(boundary)
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}; `fullweight boundaries` writes it") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the file of a layer's boundaries, or is damaged: {error}") from None
    return boundary


def kept_boundaries(folder: Path) -> list[Boundary]:
    """The layers whose files lie in `folder`, in order. Raises CheckpointError on no file, or a bad one."""
    found = sorted((read(path) for path in folder.glob("layer-*.safetensors")), key=lambda b: b.layer)
    if not found:
        raise CheckpointError(f"no layer-*.safetensors in {folder}; `fullweight boundaries` writes them")
    return found


def _check(found: Boundary) -> None:
    lengths, shape = found.layout["document_lengths"], found.tensors["entering"].shape
    if any(found.tensors[name].shape != shape for name in _TENSORS[:-1]) or len(shape) != 3:
        raise ValueError("its streams have different shapes")
    tokens = found.tensors["tokens"]
    if tokens.shape != shape[:1] or sum(lengths) != shape[0] or tokens.dtype != torch.int64:
        raise ValueError("its tokens do not fit its streams")
    if not isinstance(found.layer, int):
        raise ValueError("it names no layer")
