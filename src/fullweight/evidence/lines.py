"""The lines of a ledger that a stranger wrote, typed: what every check computes from.

`read_history` takes a stream a line at a time, within bounds, and refuses a line without what its kind must have;
whether the numbers in it are true is for the rules. Which lines were superseded is worked out from the events
`start` and `resume` alone (`superseded.py`). Keys that are not named here are kept and not looked at.

Left out: writing (`ledger.py`). Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

from fullweight.core.strict_json import parse_strict
from fullweight.evidence.bundle import LEDGER, RefusedError, Stated, bounded_lines, stated
from fullweight.evidence.ledger import GENESIS
from fullweight.evidence.superseded import BEGINNINGS, Superseded

Number = float | Literal["nan", "inf", "-inf"]
"""JSON has no NaN: a non-finite number is written as its name."""
Count = Annotated[int, Field(ge=0, le=10**18)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
"""Bounds that no run comes near, so that no sum of what a stranger wrote overflows."""


class Tokens(Stated):
    """Of one step, all ranks together; `so_far` over the run."""

    real: Count
    padding: Count
    trained: float = Field(ge=0, le=1e18)
    so_far: Count


class Peak(Stated):
    """What 100 % MFU stands for, all ranks together."""

    flops_per_second: float = Field(gt=0, le=1e30)
    source: str


class Experts(Stated):
    """Load of the experts in one step."""

    max_over_mean: float = Field(ge=0)
    dropped: Count


class Parameters(Stated):
    """Elements of the model, and how many of them train."""

    total: Count
    trained: Count


class PairCounts(Stated):
    """Query-key pairs of a step's documents by kind of attention (`flops.Pairs`); the tokens are the step's."""

    window: Count
    csa_selected: Count
    csa_visible: Count
    hca: Count


class BatchFacts(Stated):
    """Which data a step saw: a digest over the rows of all ranks, and what of their documents costs FLOPs."""

    digest: str
    samples: Count
    pairs: PairCounts


class Power(Stated):
    """Draw of the machine during a step; None is unknown."""

    watts: Annotated[float, Field(ge=0, le=1e12)] | None
    source: str | None


class Line(Stated):
    """What every line has."""

    kind: str
    step: Count
    time: float = Field(ge=0, le=1e12)
    previous: str = Field(pattern=r"^[0-9a-f]{64}$")


class StepLine(Line):
    """One optimiser step."""

    loss: dict[str, Number]
    loss_hex: dict[str, str]
    total_loss: Number
    grad_norm: Number
    learning_rate: float
    tokens: Tokens
    tokens_per_second: float
    model_flops_per_second: float
    mfu: float
    mfu_convention: str
    peak: Peak
    experts: Experts
    parameters: Parameters
    routing: str
    operations: str
    seconds: dict[str, Seconds]
    skipped: str | None
    batch: BatchFacts
    power: Power

    @property
    def total_seconds(self) -> float:
        return self.seconds["total"]


class EvalLine(Line):
    """One evaluation on held-out samples."""

    loss: dict[str, Number]
    total_loss: Number
    score: float | None
    num_scored: int
    samples: str | None = None


class EventLine(Line):
    """Something that happened."""

    what: str

    def get(self, key: str) -> Any:
        """A value that only some events have, or None."""
        return (self.model_extra or {}).get(key)


@dataclass(frozen=True)
class Placed:
    """A line, where it is, and what the bytes up to its end come to."""

    number: int  # from 1
    line: Line
    sha256: str  # of its bytes, without the newline
    end: int  # bytes of the ledger up to here, with the newline
    sha256_so_far: bytes  # of those bytes
    segment: int  # from 0
    superseded: bool = False


class History:
    """All lines of a ledger, and those that stand."""

    def __init__(self, placed: list[Placed]) -> None:
        self.all = placed
        self.live = [p for p in placed if not p.superseded]

    @property
    def steps(self) -> list[StepLine]:
        """The steps that stand, in order."""
        return [p.line for p in self.live if isinstance(p.line, StepLine)]

    @property
    def evals(self) -> list[EvalLine]:
        """The evaluations that stand, in order."""
        return [p.line for p in self.live if isinstance(p.line, EvalLine)]

    def events(self, what: str, superseded: bool = False) -> list[EventLine]:
        """Events of one sort that stand, or all of them."""
        lines = self.all if superseded else self.live
        return [p.line for p in lines if isinstance(p.line, EventLine) and p.line.what == what]

    @property
    def head(self) -> str:
        return self.all[-1].sha256 if self.all else GENESIS

    @property
    def last_step(self) -> int:
        return max((s.step for s in self.steps), default=0)

    @cached_property
    def set_back(self) -> list[Placed]:
        """Lines with which a segment begins and whose time is before that of the line before them: the clock was
        set between the segments, or is another machine's, and how long the interruption was nobody can say."""
        return [b for a, b in pairwise(self.all) if begins(b.line) and b.line.time < a.line.time]

    @property
    def wall_seconds(self) -> float | None:
        """From the first line to the last, whatever happened between; None where the clock was set back."""
        if self.set_back:
            return None
        return self.all[-1].line.time - self.all[0].line.time if self.all else 0.0


_KINDS: dict[str, type[Line]] = {"step": StepLine, "eval": EvalLine, "event": EventLine}


def read_history(stream: BinaryIO, name: str = LEDGER) -> History:
    """Every line of a ledger. Raises RefusedError on a line that cannot be understood, or an empty ledger."""
    placed = list(_placed(stream, name))
    if not placed:
        raise RefusedError("bundle.complete", f"{name} is empty")
    return History(_marked(placed))


def _placed(stream: BinaryIO, name: str) -> Iterator[Placed]:
    whole, end, segment = hashlib.sha256(), 0, -1
    for number, raw in enumerate(bounded_lines(stream, name), 1):
        where = f"{name}:{number}"
        try:
            value = parse_strict(raw)
        except ValueError as error:
            raise RefusedError("bundle.json", f"{where}: {error}") from None
        kind = _KINDS.get(str(value.get("kind"))) if isinstance(value, dict) else None
        if kind is None:
            raise RefusedError("ledger.shape", f"{where}: no line of a known kind ({', '.join(_KINDS)})")
        line = stated(kind, value, where, "ledger.shape")
        if isinstance(line, StepLine) and line.seconds.get("total", 0) <= 0:
            raise RefusedError("ledger.shape", f"{where}: seconds.total is absent or zero")
        whole.update(raw + b"\n")
        end += len(raw) + 1
        segment += begins(line)
        yield Placed(number, line, hashlib.sha256(raw).hexdigest(), end, whole.digest(), segment)


def begins(line: Line) -> bool:
    """Whether a segment begins with this line."""
    return isinstance(line, EventLine) and line.what in BEGINNINGS


def _marked(placed: list[Placed]) -> list[Placed]:
    """With the lines marked that the run went back behind."""
    beginnings = [(p.number, p.line.what, p.line.step) for p in placed if isinstance(p.line, EventLine)]
    superseded = Superseded(b for b in beginnings if b[1] in BEGINNINGS)
    return [replace(p, superseded=True) if superseded(p.number, p.line.step) else p for p in placed]
