"""One layer of a run repeated alone: its own weights from a kept state, what entered it from a file.

The layer is computed forward from the streams that entered it, and backward from the gradient of what left it.
What leaves, the gradient of what entered, and the gradient of every parameter must be as recorded: bit for bit on
the same stack, else within a bound. Memory is one layer's weights and gradients and one row, however large the
model is; every byte of the state is still read once, to know that it is the state.

What it proves: this layer did this to these numbers. That they are the run's is for files of neighbouring layers
and the state's digest in the ledger to say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fullweight.audit import stack
from fullweight.audit.again import Means, config_at, threads
from fullweight.audit.boundaries import AUXILIARY, Boundary, gradients_of, kept_boundaries
from fullweight.audit.recorded import Recorded
from fullweight.audit.replay import default_bound
from fullweight.audit.windows import Window
from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Generation, verify
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.block import Block
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.ops import resolve_operations
from fullweight.parallel.mesh import Ranks
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder
from fullweight.train.weights import workload_of


@dataclass(frozen=True)
class LayerResult:
    """How one layer came out again; relative distances by what was compared, 0 where every bit is equal."""

    layer: int
    num_bytes: int  # of the layer's weights
    exact: bool
    stack: tuple[str, ...]  # why bits may differ from the recorded ones; empty: they must not
    bound: float
    distances: dict[str, float]  # leaving, entering_gradient, and gradient norms by parameter
    differing: tuple[str, ...]  # what is not equal bit for bit, in the order of the layer's modules

    @property
    def divergent(self) -> str | None:
        """What counts against the record: the first that differs or, on another stack, is beyond the bound."""
        if not self.stack:
            return self.differing[0] if self.differing else None
        return next((name for name, value in self.distances.items() if not value <= self.bound), None)


def repeat_layer(
    boundary: Boundary, generation: Generation, config: RunConfig, bound: float | None = None
) -> LayerResult:
    """Forward and backward of one layer, on the CPU. Raises CheckpointError when file and state do not belong."""
    if generation.sha256 != boundary.manifest_sha256:
        raise CheckpointError(
            f"layer {boundary.layer} was recorded from {boundary.generation} with manifest "
            f"{boundary.manifest_sha256}, and {generation.path} has {generation.sha256}"
        )
    architecture = DeepSeekV4Config.from_published(generation.manifest.facts.model, str(generation.path))
    block = _loaded(boundary.layer, generation, architecture, config)
    context = Context.build(
        architecture,
        boundary.tensors["tokens"],
        boundary.packed(architecture.ratios),
        True,
        dense_csa=config.train.csa_attention == "visible",
    )
    entering = boundary.tensors["entering"].clone().requires_grad_()
    leaving = block(entering, context)
    sums = context.aux.sums(leaving.device)
    extra = [boundary.weights[name] * sums[name] for name in AUXILIARY if name in boundary.weights]
    extra = [value for value in extra if value.requires_grad]
    torch.autograd.backward(
        [leaving, *extra], [boundary.tensors["leaving_gradient"], *(torch.ones_like(v) for v in extra)]
    )
    assert entering.grad is not None
    bound = default_bound(generation.manifest.facts.config, 1) if bound is None else bound
    return _compared(boundary, block, leaving.detach(), entering.grad, bound)


def repeat_layers(
    root: Path,
    folder: Path,
    means: Means,
    bound: float | None = None,
    *,
    layers: Iterable[int] | None = None,
    states: Path | None = None,
) -> list[LayerResult]:
    """Repeat every layer whose file lies in `folder`, each alone, from the kept states of the run in `root`.

    `layers` are the only ones that are repeated; `states` is as of `replay`. Raises CheckpointError when there is
    none, or a file, the state or the run do not belong together.
    """
    recorded = Recorded.of(RunFolder(root), None if states is None else RunFolder(states))
    chosen = None if layers is None else set(layers)
    found = [b for b in kept_boundaries(folder) if chosen is None or b.layer in chosen]
    results, alone = [], Ranks(0, 1, torch.device("cpu"))
    verified: dict[str, Generation] = {}
    for boundary in found:
        name = boundary.generation
        if name not in verified:
            path = recorded.named().get(name)
            if path is None:
                raise CheckpointError(f"{recorded.states.checkpoints} has no {name}, where layers are from")
            verified[name] = verify(path)
            if reason := recorded.why_not_its(verified[name]):
                raise CheckpointError(reason)
        facts = verified[name].manifest.facts
        segment = recorded.segments(Window(facts.step, facts.step + 1), facts)[-1]
        count = means.threads or boundary.stood_on.get("threads")
        with tempfile.TemporaryDirectory(dir=means.scratch) as scratch, threads(count):
            config = config_at(recorded, segment, facts, alone, Path(scratch), means)
            results.append(repeat_layer(boundary, verified[name], config, bound))
    return results


def _loaded(layer: int, generation: Generation, architecture: DeepSeekV4Config, config: RunConfig) -> Block:
    """The layer with its weights from the state, and nothing else of the model."""
    workload = workload_of(config, architecture)
    operations = resolve_operations(config.ops.default, "cpu", config.ops.chosen, workload)
    with torch.device("meta"):
        block = Block(architecture, operations, layer, config.train.indexer_loss)
    if config.train.compute_dtype == torch.float64:
        block.double()
    block.to_empty(device="cpu")
    block.ffn.capacity_factor = config.parallel.expert_capacity_factor
    targets = block.state_dict(keep_vars=False)
    held = store.contents(generation)
    names = {f"model.layers.{layer}.{name}": name for name in targets}
    if absent := sorted(names.keys() - held.keys()):
        raise CheckpointError(f"{generation.path} holds no {absent[0]}: it is a state of another model")
    for full, tensor in store.stream(generation, names):
        if tensor.shape != targets[names[full]].shape:
            raise CheckpointError(f"{generation.path}: {full} has shape {list(tensor.shape)}, not the model's")
        targets[names[full]].copy_(tensor)
    trained = config.train.trained_names(architecture)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(trained is None or f"layers.{layer}.{name}" in trained)
    return block


def _compared(boundary: Boundary, block: Block, leaving: Tensor, gradient: Tensor, bound: float) -> LayerResult:
    pairs = {"leaving": leaving, "entering_gradient": gradient}
    distances = {name: _relative(boundary.tensors[name], value) for name, value in pairs.items()}
    differing = [name for name, value in pairs.items() if not torch.equal(boundary.tensors[name], value)]
    found = gradients_of(block)
    for name in _in_order(found, boundary.gradients):
        recorded, again = boundary.gradients.get(name), found.get(name)
        if recorded is None or again is None:
            distances[name] = float("inf")
        elif recorded["sha256"] != again["sha256"]:
            distances[name] = _ratio(abs(again["norm"] - recorded["norm"]), recorded["norm"])
        else:
            continue
        differing.append(name)
    size = sum(t.nbytes for t in block.state_dict().values())
    here = stack.standing(block.ops.name)
    reasons = [
        f"{n}: {v} when recorded, {here.get(n)} here" for n, v in boundary.stood_on.items() if v != here.get(n)
    ]
    return LayerResult(boundary.layer, size, not differing, tuple(reasons), bound, distances, tuple(differing))


def _in_order(*names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for group in names for name in group))


def _relative(recorded: Tensor, again: Tensor) -> float:
    return _ratio((again.double() - recorded.double()).norm().item(), recorded.double().norm().item())


def _ratio(apart: float, size: float) -> float:
    return 0.0 if apart == 0 else apart / size if size else float("inf")
