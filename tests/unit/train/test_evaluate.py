"""Held-out loss and scored answers."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fullweight.core.types import Batch, PackedLayout
from fullweight.methods import SFT
from fullweight.parallel.engine import PlainEngine
from fullweight.parallel.mesh import Ranks
from fullweight.train.evaluate import Question, answer_questions, held_out_loss, score
from fullweight.train.step import LossConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
EOS = 7


class Characters:
    """Ids are code points; EOS is `eos_id`."""

    eos_id = EOS

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return "".join(map(chr, ids))


@dataclasses.dataclass
class Output:
    losses: dict[str, Tensor]
    expert_counts: Tensor
    dropped: Tensor


class SumModel(nn.Module):
    """lm is the sum of the trained targets."""

    def forward(self, batch: Batch) -> object:
        targets, weights = batch.targets()
        assert not torch.is_grad_enabled()
        none = torch.zeros(0, dtype=torch.int64)
        return Output({"lm": (targets * weights).sum()}, none.view(0, 0), none)

    def loss_counts(self, batch: Batch) -> dict[str, float]:
        return {"lm": float(batch.targets()[1].sum()), "mtp": 0.0}


def _row(tokens: list[int], mask: list[float]) -> Batch:
    return Batch(torch.tensor(tokens), torch.tensor(mask), PackedLayout.build([len(tokens)]))


def test_held_out_loss_is_per_token_over_all_rows() -> None:
    """(4 + 5 + 6 + 8) / 4; a row without loss weights (given where a rank has no row left) counts nothing."""
    rows = [_row([1, 4, 5, 6], [1, 1, 1, 1]), _row([7, 8], [0, 1]), _row([9, 9], [0, 0])]
    model = SumModel()
    means, total = held_out_loss(model, SFT(), PlainEngine(model), rows, LossConfig(), ALONE)
    assert means == {"lm": pytest.approx(23 / 4)}
    assert total == pytest.approx(23 / 4)


def test_no_held_out_data_is_no_number() -> None:
    """An absent loss is absent, not 0."""
    model = SumModel()
    assert held_out_loss(model, SFT(), PlainEngine(model), [], LossConfig(), ALONE) == ({}, 0.0)


def _question(name: str, task: bool) -> Question:
    sample = {"id": name, "messages": [{"role": "user", "content": f"say {name}"}], "answer": name}
    return Question(sample | ({"task": "echo"} if task else {}), 1, [ord(c) for c in name])


def test_answers_keep_their_order_end_at_eos_and_are_checked() -> None:
    """5 questions in batches of 2; replies run on after the end token in a batch and must be cut there."""
    questions = [_question(n, task=n != "d") for n in "abcde"]
    sizes = []

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        sizes.append(len(prompts))
        return [[*(p if p != [ord("b")] else [ord("x")]), EOS, 65, 66] for p in prompts]

    answers = answer_questions(
        generate,
        questions,
        Characters(),
        batch_size=2,
        checker=lambda sample, response: sample["answer"] == response,
        ranks=ALONE,
    )
    assert sizes == [2, 2, 1]
    assert [a.id for a in answers] == list("abcde")
    assert [a.correct for a in answers] == [True, False, True, None, True]
    assert answers[0].question == "say a"
    assert score(answers) == pytest.approx(3 / 4)


def test_without_a_checker_there_is_no_score() -> None:
    """Real data without an exact checker is shown, never scored."""
    answers = answer_questions(
        lambda p: p, [_question("a", True)], Characters(), batch_size=4, checker=None, ranks=ALONE
    )
    assert answers[0].correct is None
    assert score(answers) is None
