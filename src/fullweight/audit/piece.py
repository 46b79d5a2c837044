"""One pass of a piece of the model, or of a stage's pieces, through a recorded step, and what came of it.

The model is made with nothing in it but the piece, and its own methods run it, so the arithmetic is that of
training. `repeated` takes the step, `compared` says what differs from the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fullweight.audit.boundaries import Boundary, Failure, Refused
from fullweight.audit.states import distance_of, first_beyond
from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Generation
from fullweight.core.errors import CheckpointError
from fullweight.core.types import Batch
from fullweight.models.deepseek_v4.block import Sublayers
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.context import Context
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.moe import update_bias
from fullweight.optim.clip import clip_factor, scale_gradients
from fullweight.optim.groups import build_optimizers, kind, set_learning_rate
from fullweight.train.boundaries import GRADIENT, Heard, gradient_facts
from fullweight.train.config import RunConfig
from fullweight.train.step import weighted_total
from fullweight.train.weights import empty_model

TENSOR_BOUND = 0.3
"""Of one tensor's effect, as in a replay of whole steps."""
_LEAST_SHARE = 1e-2  # of the bound, likewise


@dataclass(frozen=True)
class Again:
    """What came out of a unit of pieces."""

    unit: tuple[str, ...]
    operations: str
    num_bytes: int
    values: dict[str, Tensor]  # [rows, T, ...] by full name, such as `layer-3.leaving`
    gradients: dict[str, dict[str, Any]]  # by parameter
    losses: dict[str, float]  # means of the step, of the head's unit
    before: dict[str, Tensor]  # the unit's tensors of the state before the step, by their names there
    after: dict[str, Tensor]
    matrices: dict[str, int]


@dataclass
class Outcome:
    """What counts against the record first, if anything, and all that is not equal bit for bit."""

    failure: Failure | None = None
    reason: str = ""
    distances: dict[str, float] = field(default_factory=dict)
    differing: tuple[str, ...] = ()


def repeated(
    unit: tuple[str, ...],
    found: Mapping[str, Boundary],
    start: Generation,
    config: RunConfig,
    line: Mapping[str, Any],
) -> Again:
    """Take the step of a unit on the CPU. `found` has what enters and leaves it, `line` the step's ledger line."""
    architecture = DeepSeekV4Config.from_published(start.manifest.facts.model, str(start.path))
    model = _model(unit, config, architecture)
    before = _loaded(model, start)
    boundary = next(iter(found.values()))
    counts = _counts(config, model, boundary.batches)
    heard, sums = Heard(frozenset(unit), batches=list(boundary.batches)), dict[str, float]()
    routed: dict[str, Tensor] = {}
    model.watch = heard
    for row, batch in enumerate(boundary.batches):
        _row(_Pass(model, unit, batch, row, found, heard), config, counts, sums, routed)
    model.watch = None
    gradients = {name: gradient_facts(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    after = _stepped(model, before, config, line, routed)
    values = {f"{piece}.{side}": t for piece in unit for side, t in heard.stacked(piece).items()}
    losses = {name: value / counts[name] for name, value in sums.items() if counts[name] > 0}
    matrices = {f"model.{name}": role.num_matrices for name, role in model.parameter_roles().items()}
    size = sum(t.nbytes for t in model.state_dict().values())
    return Again(unit, model.ops.name, size, values, gradients, losses, before, after, matrices)


def compared(
    again: Again,
    found: Mapping[str, Boundary],
    line: Mapping[str, Any],
    states: tuple[Generation, Generation | None],
    bound: float | None,
) -> Outcome:
    """What differs, in the order of the pass; `bound` None: every bit counts."""
    outcome, differing = Outcome(), list[str]()
    for failure, name, distance, most in _differences(again, found, line, bound):
        differing.append(name)
        outcome.distances[name] = distance
        if outcome.failure is None and not (bound is not None and distance <= most):
            outcome.failure = failure
            outcome.reason = f"{name} differs by {distance:.1e}" + (
                "" if bound is None else f", beyond {bound:.0e}"
            )
    if states[1] is not None:
        _compare_states(again, states[1], bound, outcome, differing)
    outcome.differing = tuple(differing)
    return outcome


def relative(recorded: Tensor, again: Tensor) -> float:
    """Norm of the difference over the recorded norm; infinite between different shapes."""
    if recorded.shape != again.shape:
        return float("inf")
    return _ratio((again.double() - recorded.double()).norm().item(), recorded.double().norm().item())


@dataclass(frozen=True)
class _Pass:
    """One row through a unit: what enters from files, what is handed on inside."""

    model: DeepSeekV4
    unit: tuple[str, ...]
    batch: Batch
    row: int
    found: Mapping[str, Boundary]
    heard: Heard

    def entering(self, piece: str, side: str) -> Tensor:
        """What enters a piece from outside of the unit, as a leaf whose gradient is asked for."""
        tensors = self.found[piece].tensors
        if side not in tensors:
            raise Refused(Failure.damaged, f"the files of {piece} have no {side}")
        return tensors[side][self.row].clone().requires_grad_(f"{side}{GRADIENT}" in tensors)

    def gradient(self, piece: str, side: str) -> Tensor | None:
        """The recorded gradient of what leaves the unit."""
        stacked = self.found[piece].tensors.get(side + GRADIENT)
        return None if stacked is None else stacked[self.row]

    def run(self, context: Context) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """(loss sums, what leaves the unit with its gradient)."""
        model, unit, last = self.model, self.unit, len(self.model.layers) - 1
        leaving: list[tuple[str, str, Tensor]] = []
        losses: dict[str, Tensor] = {}
        streams = following = ahead = None
        if "embedding" in unit:
            embedded, following = model.embed_row(self.batch.tokens)
            streams = model.spread(embedded)
            if "layer-0" not in unit:
                leaving.append(("embedding", "leaving", embedded))
            if "mtp" not in unit:
                leaving.append(("embedding", "following", following))
        for piece in unit:
            if piece.startswith("layer-"):
                entering = self.entering(piece, "entering") if streams is None or piece == unit[0] else streams
                streams = model.run_layer(int(piece.removeprefix("layer-")), entering, context)
        layers = [piece for piece in unit if piece.startswith("layer-")]
        if layers and streams is not None and (layers[-1] != f"layer-{last}" or "head" not in unit):
            leaving.append((layers[-1], "leaving", streams))
        if "mtp" in unit:
            entering = streams if streams is not None else self.entering("mtp", "entering")
            following = following if following is not None else self.entering("mtp", "following")
            ahead = model.look_ahead(entering, following, self.batch, context)
            if "head" not in unit:
                leaving.append(("mtp", "leaving", ahead))
        if "head" in unit:
            entering = streams if streams is not None else self.entering("head", "entering")
            losses["lm"], _ = model.predict(entering, self.batch)
            if model.mtp:
                ahead = ahead if ahead is not None else self.entering("head", "ahead")
                losses["mtp"] = model.predict_ahead(ahead, self.batch)
        pairs = [(t, self.gradient(piece, side)) for piece, side, t in leaving]
        return losses, [(t, g) for t, g in pairs if g is not None and t.requires_grad]


def _row(
    passing: _Pass,
    config: RunConfig,
    counts: dict[str, float],
    sums: dict[str, float],
    routed: dict[str, Tensor],
) -> None:
    """Forward and backward of one row; adds loss sums of the head and tokens by expert."""
    context = passing.model.context(passing.batch.tokens, passing.batch.layout, with_losses=True)
    losses, leaving = passing.run(context)
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double().item()
    blocks = [piece for piece in passing.unit if piece.startswith("layer-") or piece == "mtp"]
    for piece, found in zip(blocks, context.aux.expert_counts, strict=True):
        routed[piece] = routed[piece] + found if piece in routed else found
    total = weighted_total(losses | context.aux.sums(passing.batch.tokens.device), counts, config.train.loss)
    roots = [*leaving, *([(total, torch.ones_like(total))] if total.requires_grad else [])]
    if roots:
        torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])


def _model(unit: Sequence[str], config: RunConfig, architecture: DeepSeekV4Config) -> DeepSeekV4:
    """The model with the unit alone, and storage for it."""
    model = empty_model(config, architecture, "cpu")
    model.set_expert_capacity(config.parallel.expert_capacity_factor)
    layers = {int(piece.removeprefix("layer-")) for piece in unit if piece.startswith("layer-")}
    model.keep_pieces(layers, embedding="embedding" in unit, head="head" in unit, mtp="mtp" in unit)
    return model.to_empty(device="cpu")


def _loaded(model: DeepSeekV4, start: Generation) -> dict[str, Tensor]:
    """Fill the model from a state; copies of its tensors and of their moments, by their names there."""
    targets = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=False).items()}
    held = store.contents(start)
    if absent := sorted(targets.keys() - held.keys()):
        raise CheckpointError(f"{start.path} holds no {absent[0]}: it is a state of another model")
    own = {name for name, _ in model.named_parameters()}
    moments = [n for n in held if n.startswith("optimizer.") and _parameter_of(n) in own]
    before: dict[str, Tensor] = {}
    for name, tensor in store.stream(start, sorted([*targets, *moments])):
        if name in targets:
            if tensor.shape != targets[name].shape:
                raise CheckpointError(f"{start.path}: {name} has shape {list(tensor.shape)}, not the model's")
            targets[name].copy_(tensor)
        before[name] = tensor.clone()
    return before


def _parameter_of(moment: str) -> str:
    """`optimizer.adamw.NAME.exp_avg` -> NAME."""
    return moment.split(".", 2)[2].rpartition(".")[0]


def _counts(config: RunConfig, model: DeepSeekV4, batches: Sequence[Batch]) -> dict[str, float]:
    """What each loss of the step is divided by, from its rows."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, value in config.method.loss_counts(model, batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return counts


def _stepped(
    model: DeepSeekV4,
    before: Mapping[str, Tensor],
    config: RunConfig,
    line: Mapping[str, Any],
    routed: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The unit's tensors of the state after the step, by their names there; as they were if it was skipped."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, model.parameter_roles(), config.optimizer) if trains else []
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            prefix = f"optimizer.{kind(optimizer)}.{names[parameter]}."
            kept = {n.removeprefix(prefix): t.clone() for n, t in before.items() if n.startswith(prefix)}
            if kept:
                optimizer.state[parameter] = kept
    if line.get("skipped") is None:
        set_learning_rate(optimizers, float(line["learning_rate"]))
        factor = clip_factor(float(line["grad_norm"]), config.optimizer.clip_norm)
        scale_gradients(list(model.parameters()), factor, optimizers)
        for optimizer in optimizers:
            optimizer.step()
        for piece, counts in routed.items():
            block = model.mtp[0] if piece == "mtp" else model.layers[int(piece.removeprefix("layer-"))]
            assert isinstance(block, Sublayers)
            if block.ffn.gate.bias_trains:
                update_bias(block.ffn.gate.get_buffer("bias"), counts, config.train.loss.router_bias_speed)
    after = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            after |= {f"optimizer.{kind(optimizer)}.{names[parameter]}.{key}": t for key, t in state.items()}
    return after


def _differences(
    again: Again, found: Mapping[str, Boundary], line: Mapping[str, Any], bound: float | None
) -> Iterator[tuple[Failure, str, float, float]]:
    """What the passes gave that is not equal bit for bit: (what it would mean, name, relative distance, limit)."""
    most = bound or 0.0
    own = {f"{p}.{side}": t for p, b in found.items() for side, t in b.tensors.items()}
    backward = [name for name in again.values if name.endswith(GRADIENT)]
    for name in [*(n for n in again.values if n not in backward), *reversed(backward)]:
        if name not in own or torch.equal(own[name], again.values[name]):
            continue
        failure = Failure.entering_gradient if name in backward else Failure.leaving
        yield failure, name, relative(own[name], again.values[name]), most
    for name, value in again.losses.items():
        told = float(line["loss"][name])
        if told != value:
            yield Failure.loss, f"loss.{name}", _ratio(abs(told - value), abs(told)), most
    yield from _gradient_differences(again, found, bound)


def _gradient_differences(
    again: Again, found: Mapping[str, Boundary], bound: float | None
) -> Iterator[tuple[Failure, str, float, float]]:
    """Norms of parameters' gradients that differ, relative to that of all of them.

    A sum that nearly cancels, such as that of a scale, is mostly rounding: alone it may differ by TENSOR_BOUND of
    itself, and by more where that is next to nothing of the whole.
    """
    told_gradients = {n: facts for b in found.values() for n, facts in b.gradients.items()}
    whole = sum(facts["norm"] ** 2 for facts in again.gradients.values()) ** 0.5
    most = bound or 0.0
    for name in dict.fromkeys([*again.gradients, *told_gradients]):
        recorded, here = told_gradients.get(name), again.gradients.get(name)
        if recorded is None and len(again.unit) > 1:
            continue  # of a piece inside of the unit, whose file was not read
        if recorded is None or here is None:
            yield Failure.parameter_gradient, name, float("inf"), most
        elif recorded["sha256"] != here["sha256"] and (bound is None or recorded["norm"] != here["norm"]):
            apart = abs(here["norm"] - recorded["norm"])
            alone = _ratio(apart, recorded["norm"]) <= TENSOR_BOUND
            yield Failure.parameter_gradient, name, _ratio(apart, whole), most if alone else _LEAST_SHARE * most


def _compare_states(
    again: Again, end: Generation, bound: float | None, outcome: Outcome, differing: list[str]
) -> None:
    """Hold the unit's tensors after the step against the state that is kept of it."""
    held = store.contents(end)
    wanted = sorted(name for name in again.after if name in held)
    absent = sorted(again.after.keys() - held.keys())
    recorded = dict(store.stream(end, wanted))
    triples = {
        n: (recorded[n], again.after[n], again.before.get(n, torch.zeros_like(recorded[n]))) for n in wanted
    }
    apart = distance_of(triples, again.matrices)
    differing += [*absent, *(d.name for d in apart.tensors)]
    outcome.distances |= {f"{d.name} after": d.share for d in apart.tensors if d.effect is not None}
    outcome.distances |= {"moments after": apart.moments} if apart.moments else {}
    if outcome.failure is not None or not differing:
        return
    if absent:
        outcome.failure, outcome.reason = Failure.moments, f"the state after the step lacks {absent[0]}"
        return
    moved = [n for n in wanted if n.startswith("model.") and not torch.equal(again.after[n], again.before[n])]
    stood = [n for n in moved if torch.equal(recorded[n], again.before[n])]
    worst = next(iter(apart.tensors), None)
    if bound is not None:
        floats = [d for d in apart.tensors if d.note is None]
        worst = first_beyond(floats, TENSOR_BOUND, _LEAST_SHARE * bound)
        if worst is None and not apart.effect <= bound:
            worst = max(apart.tensors, key=lambda d: d.share)
        elif worst is None and not apart.moments <= bound:
            worst = max((d for d in floats if d.effect is None), key=lambda d: d.relative)
    if worst is None:
        return
    if moved and stood == moved:
        outcome.failure = Failure.frozen
        outcome.reason = f"its weights after the step are those before it, and the step moves {moved[0]}"
        return
    frozen = [n for n in stood if n == worst.name]
    outcome.failure = (
        Failure.frozen if frozen else Failure.weights if worst.name.startswith("model.") else Failure.moments
    )
    size = worst.note or f"by {worst.relative:.1e}, by effect {worst.effect or 0.0:.1e}"
    outcome.reason = f"{worst.name} after the step differs: {size}"


def _ratio(apart: float, size: float) -> float:
    return 0.0 if apart == 0 else apart / size if size else float("inf")
