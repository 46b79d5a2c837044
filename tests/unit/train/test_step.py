"""The step's arithmetic, on a model small enough to compute by hand."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fullweight.core.errors import TrainingError
from fullweight.core.types import Batch, PackedLayout
from fullweight.methods import SFT
from fullweight.ops.reference import ReferenceOperations
from fullweight.parallel.engine import PlainEngine
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard, GuardConfig
from fullweight.train.step import LossConfig, Phases, StepResult, training_step, weighted_total

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@dataclasses.dataclass
class Output:
    losses: dict[str, Tensor]
    expert_counts: Tensor
    dropped: Tensor


class Line(nn.Module):
    """lm = sum over trained targets of weight * token; its gradient is the sum of the trained tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = ReferenceOperations()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.idle = nn.Parameter(torch.tensor([1.0]))
        self.config = dataclasses.make_dataclass("C", [("vocab_size", int)])(10)
        self.bias_updates: list[tuple[list, float]] = []
        self.scale = 1.0

    def forward(self, batch: Batch) -> Output:
        targets, weights = batch.targets()
        lm = (self.weight * targets.float() * weights).sum() * self.scale
        counts = torch.bincount(batch.tokens % 2, minlength=2)[None]
        return Output({"lm": lm, "balance": self.weight.sum() * 3}, counts, counts.new_zeros(1))

    def loss_counts(self, batch: Batch) -> dict[str, float]:
        return {"lm": float(batch.targets()[1].sum()), "balance": float(batch.layout.num_documents), "mtp": 0.0}

    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        self.bias_updates.append((counts.tolist(), speed))


def batch(tokens: list[int], mask: list[float], lengths: list[int], size: int) -> Batch:
    """One row; tokens and mask are padded with zeros."""
    pad = size - len(tokens)
    layout = PackedLayout.build(lengths, num_tokens=size)
    return Batch(torch.tensor(tokens + [0] * pad), torch.tensor(mask + [0.0] * pad), layout, ("a",))


# Trained targets: 3 and 5 of the first row, 7 of the second; 3 documents, 3 trained tokens in all.
FIRST = batch([1, 3, 2, 5], [0, 1, 0, 1], [2, 2], 6)
SECOND = batch([4, 7, 9], [0, 1, 0], [3], 6)


def run(model: Line, batches: list[Batch], policy: str = "stop", lr: float = 0.1) -> StepResult:
    return training_step(
        model,
        SFT(),
        [torch.optim.SGD(model.parameters(), lr=lr)],
        batches,
        engine=PlainEngine(model),
        losses=LossConfig(balance=0.5),
        clip_norm=1e9,
        guard=Guard(GuardConfig(non_finite=policy)),
        ranks=ALONE,
        phases=Phases(CPU),
    )


def test_tokens_weigh_the_same_across_micro_batches() -> None:
    """Gradient = (3 + 5 + 7) / 3 + 0.5 * (3 + 3) / 3 documents = 6, not the mean of two row means."""
    model = Line()
    result = run(model, [FIRST, SECOND])
    assert result.grad_norm == pytest.approx(6.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 6.0)
    assert result.losses == pytest.approx({"lm": 2 * 15 / 3, "balance": 2 * 6 / 3})
    assert result.total_loss == pytest.approx(10 + 0.5 * 4)


def test_the_record_counts_tokens_padding_and_what_was_not_reached() -> None:
    """Padding is in no count; used vocabulary is {1,2,3,4,5,7,9}; `idle` got no gradient."""
    model = Line()
    result = run(model, [FIRST, SECOND])
    assert (result.num_tokens, result.num_padding, result.num_trained) == (7, 5, 3.0)
    assert result.document_lengths == (2, 2, 3)
    assert result.num_unseen_embeddings == 3
    assert result.without_gradient == ("idle",)
    counts = (torch.bincount(FIRST.tokens % 2) + torch.bincount(SECOND.tokens % 2)).tolist()
    assert model.bias_updates == [([counts], 1e-3)]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing(policy: str, value: float) -> None:
    """Weights and router bias stay, gradients are gone, the refusal is in the result under both policies."""
    model = Line()
    model.scale = value
    result = run(model, [FIRST], policy)
    assert result.refusal is not None
    assert "lm loss" in result.refusal
    assert model.weight.item() == 2.0
    assert model.bias_updates == []
    assert model.weight.grad is None


def test_a_step_without_a_trained_token_is_an_error_before_the_forward_pass() -> None:
    """Dividing by zero tokens would be NaN; the user is told what to check instead."""
    model = Line()
    with pytest.raises(TrainingError, match="no token of this step"):
        run(model, [batch([1, 2], [0, 0], [2], 4)])
    assert model.weight.grad is None


def test_a_step_that_can_train_nothing_is_an_error() -> None:
    """Everything that the losses read is frozen: a message, not autograd's complaint."""
    model = Line()
    model.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="depends on a parameter that trains"):
        run(model, [FIRST])


def test_a_component_without_count_adds_nothing() -> None:
    """A packed row can hold no token two ahead; 0 / 0 must not poison the total."""
    total = weighted_total(
        {"lm": torch.tensor(6.0), "mtp": torch.tensor(0.0)}, {"lm": 3.0, "mtp": 0.0}, LossConfig()
    )
    assert total.item() == 2.0


def test_phases_add_up_to_the_time_that_passed() -> None:
    """Every second of a step belongs to one phase."""
    phases = Phases(CPU)
    start = phases._last
    for name in ("data", "forward", "backward", "forward", "optimizer"):
        phases.end(name)
    assert sum(phases.seconds.values()) == pytest.approx(phases._last - start)
    assert list(phases.seconds) == ["data", "forward", "backward", "optimizer"]
