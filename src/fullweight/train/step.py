"""One optimiser step: micro-batches in, weights changed once, numbers out.

The order matters. Normalisers come first, summed over micro-batches and ranks, so that every token of the
step weighs the same however it was packed; then forward and backward of each micro-batch; then one global
gradient norm; then the verdict, on numbers that are equal on every rank; only then do weights and router
biases move. The router bias follows the expert counts of the whole step.

Left out: overlap of the reductions with the backward pass (FSDP overlaps its own).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from fullweight.core import phase
from fullweight.core.collector import collector_paused
from fullweight.core.config import Config
from fullweight.core.errors import TrainingError
from fullweight.core.tensors import local_part
from fullweight.core.types import Batch
from fullweight.devices import of
from fullweight.methods import Method
from fullweight.models.deepseek_v4.model import parameters_of
from fullweight.optim.clip import clip_grad_norm, local_norms
from fullweight.parallel.engine import Engine
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard


class LossConfig(Config):
    """What each loss component counts in the total, beside the language-model loss at 1.

    `mtp` 0.3 and `balance` 1e-4 are DeepSeek-V4's. `indexer` is 1: its gradient reaches the indexer alone
    (input and target are detached) and the optimisers' updates do not depend on a gradient's scale, so the
    factor only sets how the indexer shares in the clipped global norm.
    """

    mtp: float = Field(0.3, ge=0)
    indexer: float = Field(1.0, ge=0)
    balance: float = Field(1e-4, ge=0)
    router_bias_speed: float = Field(1e-3, ge=0)

    def coefficient(self, component: str) -> float:
        """Factor of a loss component in the total; 1 for a method's main loss."""
        return float(getattr(self, component, 1.0))


@dataclass
class Phases:
    """Seconds spent by phase in one step; a device is waited for at each boundary, or times would lie."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def end(self, phase: str) -> None:
        """Book the time since the last boundary under `phase`."""
        of(self.device).synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class StepResult:
    """Global numbers of one step, equal on every rank."""

    losses: dict[str, float]  # mean of each component, not multiplied by its coefficient
    total_loss: float
    counts: dict[str, float]  # what each component was divided by
    grad_norm: float  # before clipping
    num_tokens: int  # real tokens
    num_padding: int
    num_trained: float  # sum of loss weights
    document_lengths: tuple[int, ...]  # this rank's, without padding
    expert_counts: Tensor  # [MoE layers, experts] int64: as chosen
    num_dropped: int  # of those choices, the ones that found their expert at its capacity
    token_counts: Tensor  # [vocabulary] int64: real tokens of the step by their id
    without_gradient: tuple[str, ...]  # trainable parameters whose gradient is absent or exactly zero
    refusal: str | None  # why the weights were left alone

    @property
    def num_unseen_embeddings(self) -> int:
        """Vocabulary rows that no token of the step used."""
        return int((self.token_counts == 0).sum())


@collector_paused()
def training_step(
    model: nn.Module,
    method: Method,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    engine: Engine,
    losses: LossConfig,
    clip_norm: float,
    guard: Guard,
    ranks: Ranks,
    phases: Phases,
) -> StepResult:
    """Run one step over this rank's micro-batches (on the device) and apply it unless the guard refuses.

    `engine` is how the ranks pass through the model together; ranks that share rows get the same ones.

    Raises TrainingError when no token of the step, on any rank, is to be learnt, or no trained parameter reached.
    """
    counts, tokens = global_counts(method, model, batches, ranks), _global_tokens(batches, ranks)
    _require_trained(counts[method.main_loss], batches)
    phases.end("data")
    phase.enter("forward")
    shares = engine.run(batches, lambda sums: weighted_total(sums, counts, losses), phases.end)

    phase.enter("optimizer")
    means = global_means(shares.losses, counts, ranks)
    expert_counts, dropped = ranks.reduce(shares.expert_counts), ranks.reduce(shares.dropped)
    norms = local_norms(p.grad for p in model.parameters() if p.grad is not None)
    without_gradient = _without_gradient(model, norms, ranks)
    grad_norm = clip_grad_norm(
        model.parameters(), clip_norm, norms, across=ranks.stages, optimizers=optimizers
    ).item()
    refusal = guard.refusal(means, grad_norm)
    if refusal is None:
        for optimizer in optimizers:
            optimizer.step()
        model.update_router_bias(expert_counts, losses.router_bias_speed)  # type: ignore[operator]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    phases.end("optimizer")
    return StepResult(
        losses=means,
        total_loss=sum(losses.coefficient(name) * value for name, value in means.items()),
        counts=counts,
        grad_norm=grad_norm,
        num_tokens=tokens[0],
        num_padding=tokens[1],
        num_trained=counts[method.main_loss],
        document_lengths=tuple(n for b in batches for n in real_lengths(b)),
        expert_counts=expert_counts.cpu(),
        num_dropped=int(dropped.sum()),
        token_counts=_token_counts(model, batches, ranks),
        without_gradient=without_gradient,
        refusal=refusal,
    )


def weighted_total(sums: dict[str, Tensor], counts: dict[str, float], losses: LossConfig) -> Tensor:
    """sum_k coefficient_k * sum_k / count_k, the scalar to differentiate; a component without count is 0."""
    terms = [losses.coefficient(k) / counts[k] * value for k, value in sums.items() if counts[k] > 0]
    return torch.stack(terms).sum()


def real_lengths(batch: Batch) -> tuple[int, ...]:
    """Document lengths of a row without its padding."""
    return batch.layout.document_lengths[: batch.layout.num_documents]


def global_counts(method: Method, model: nn.Module, batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
    """Normaliser of every loss component over the micro-batches of all ranks."""
    local = [method.loss_counts(model, batch) for batch in batches]
    names = sorted(local[0])
    values = torch.tensor([sum(counts[n] for counts in local) for n in names], dtype=torch.float64)
    return dict(zip(names, ranks.reduce(values * ranks.counts_row).tolist(), strict=True))


def _require_trained(count: float, batches: Sequence[Batch]) -> None:
    """Raise TrainingError when nothing is to be learnt."""
    if count <= 0:
        ids = [i for b in batches for i in b.sample_ids][:3]
        raise TrainingError(
            f"no token of this step is to be learnt (samples {', '.join(ids) or 'without ids'}, ...); "
            "expected at least one with loss: check the roles and per-message opt-outs, or raise "
            "data.row_tokens if answers were truncated away"
        )


def _global_tokens(batches: Sequence[Batch], ranks: Ranks) -> tuple[int, int]:
    """(real tokens, padding) of all ranks."""
    padding = sum(b.layout.num_padding for b in batches)
    values = torch.tensor([sum(b.num_tokens for b in batches) - padding, padding], dtype=torch.float64)
    real, filled = ranks.reduce(values * ranks.counts_row).tolist()
    return int(real), int(filled)


def global_means(sums: dict[str, Tensor], counts: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Mean of every component that some rank has a share of; `counts` are global and name all components."""
    names = sorted(counts)
    zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
    values = [(sums.get(name, zero), torch.full_like(zero, name in sums)) for name in names]
    reduced = ranks.reduce(torch.stack([torch.stack(pair) for pair in values])).tolist()
    found = {name: total for name, (total, present) in zip(names, reduced, strict=True) if present}
    return {name: total / counts[name] if counts[name] > 0 else 0.0 for name, total in found.items()}


@torch.no_grad()
def _without_gradient(model: nn.Module, norms: Sequence[Tensor], ranks: Ranks) -> tuple[str, ...]:
    """Names of trainable parameters that nothing of this step reached, on any rank.

    `norms` are those of the gradients that there are, in the model's order.
    """
    names = [name for name, facts in parameters_of(model).items() if facts.trains]
    place = {name: i for i, name in enumerate(names)}
    reached = torch.zeros(len(names))
    present = [(place[n], p.grad) for n, p in model.named_parameters() if p.grad is not None]
    flags = (torch.stack(list(norms)) != 0).float().cpu() if norms else torch.zeros(0)  # NaN counts as reached
    for (i, gradient), flag in zip(present, flags.tolist(), strict=True):
        # squares of gradients below 1e-23 vanish, and so may a norm
        reached[i] = flag or float(local_part(gradient).any())
    reached = ranks.reduce(reached, "max")
    return tuple(name for name, flag in zip(names, reached.tolist(), strict=True) if not flag)


def _token_counts(model: nn.Module, batches: Iterable[Batch], ranks: Ranks) -> Tensor:
    """[vocabulary] int64: the real tokens of all ranks by their id."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for batch in batches if ranks.counts_row else ():
        ids = batch.tokens[: batch.num_tokens - batch.layout.num_padding].cpu()
        counts.scatter_add_(0, ids, torch.ones_like(ids))  # unlike bincount, known to tensors without data
    return ranks.reduce(counts)
