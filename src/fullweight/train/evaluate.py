"""How good the model is on what it never trained on: held-out loss, and answers it generates, scored.

Rows and questions are divided over ranks. The score is exact match by the checker that belongs to the data;
a question without one is shown, never scored. Decoding is greedy, so the score is a function of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from fullweight.core import phase
from fullweight.core.config import Config
from fullweight.core.types import Batch
from fullweight.data.loader import PackedLoader
from fullweight.methods import Method
from fullweight.parallel.engine import Engine
from fullweight.parallel.mesh import Ranks
from fullweight.train.step import LossConfig, global_counts, global_means

Checker = Callable[[dict[str, Any], str], bool]
Generate = Callable[[list[list[int]]], list[list[int]]]


class EvalConfig(Config):
    """When and how much to evaluate; start and end are always evaluated."""

    every: PositiveInt | None = None
    num_samples: NonNegativeInt = 64
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 32
    show: NonNegativeInt = 3


class Codec(Protocol):
    """The part of a tokenizer that generation needs."""

    eos_id: int

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...


@dataclass(frozen=True)
class Question:
    """A held-out sample and what the model is to continue: its first `num_messages`, as token ids."""

    sample: dict[str, Any]
    num_messages: int
    prompt: list[int]


@dataclass(frozen=True)
class Answer:
    """What the model said; `correct` is None when the sample has no checker."""

    id: str
    question: str
    response: str
    expected: str | None
    correct: bool | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Held-out numbers at one step; `score` is the share of scored answers that are right."""

    losses: dict[str, float]
    total_loss: float
    score: float | None
    answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        scored = sum(a.correct is not None for a in self.answers)
        return {"loss": self.losses, "total_loss": self.total_loss, "score": self.score, "num_scored": scored}


def held_out_loss(
    model: nn.Module, method: Method, engine: Engine, batches: Sequence[Batch], losses: LossConfig, ranks: Ranks
) -> tuple[dict[str, float], float]:
    """(mean of each loss component, their weighted total), the same on every rank.

    `batches` are this rank's held-out rows, equally many on every rank (one without loss weights where a
    rank has none left: sharded models need all ranks in every pass). None give no
    components and a total of 0.
    """
    if not batches:
        return {}, 0.0
    counts = global_counts(method, model, batches, ranks)
    shares = engine.evaluate([batch.to(ranks.device) for batch in batches])
    means = global_means(shares.losses, counts, ranks)
    return means, sum(losses.coefficient(n) * v for n, v in means.items())


def asked(loader: PackedLoader, questions: Sequence[Question]) -> dict[str, Any]:
    """For the ledger: which samples an evaluation is of, by the digest of their ids in order, and how many."""
    held_out = loader.prepared.held_out.ids
    return {
        "samples": samples_digest(held_out, questions),
        "num_samples": len(held_out),
        "num_questions": len(questions),
    }


def samples_digest(held_out: Sequence[str], questions: Sequence[Question]) -> str:
    """SHA-256 over the ids of held-out samples and questions, sorted, as JSON."""
    ids = sorted({*held_out, *(str(question.sample.get("id", "")) for question in questions)})
    return hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()


def answer_questions(
    generate: Generate | None,
    questions: Sequence[Question],
    tokenizer: Codec,
    *,
    batch_size: int,
    checker: Checker | None,
    ranks: Ranks,
) -> list[Answer]:
    """The model's answers in the order of `questions`, on every rank. All ranks must call it together.

    `generate` is given on the ranks that have a model to ask (`weights.readable`).
    """
    able = [rank for rank, has in enumerate(ranks.gather(generate is not None)) if has]
    answers: list[tuple[int, Answer]] = []
    if generate is not None:
        own = list(enumerate(questions))[able.index(ranks.rank) :: len(able)]
        for start in range(0, len(own), batch_size):
            phase.enter("evaluation", f"answers from {start}")
            chunk = own[start : start + batch_size]
            replies = generate([q.prompt for _, q in chunk])
            for (index, question), ids in zip(chunk, replies, strict=True):
                answers.append((index, _judge(question, ids, tokenizer, checker)))
    everyone = ranks.gather(answers)
    return [answer for _, answer in sorted((pair for part in everyone for pair in part), key=lambda p: p[0])]


def score(answers: Sequence[Answer]) -> float | None:
    """Share of right answers among those that can be checked; None when none can."""
    checked = [a.correct for a in answers if a.correct is not None]
    return sum(checked) / len(checked) if checked else None


def _judge(question: Question, ids: list[int], tokenizer: Codec, checker: Checker | None) -> Answer:
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    response = tokenizer.decode(ids[:end])
    sample = question.sample
    return Answer(
        id=str(sample.get("id", "")),
        question=sample["messages"][question.num_messages - 1].get("content") or "",
        response=response,
        expected=None if sample.get("answer") is None else str(sample["answer"]),
        correct=checker(sample, response) if checker is not None and "task" in sample else None,
    )
