"""Steps or layers of a bundle's run, drawn after its ledger was sealed and taken again: one claim of the verdict.

Candidates are what the sealed files name, not what happens to be at hand: windows between the states that were
kept, and pieces of the steps of which the ledger names the boundaries by their root, so that a list with fewer
pieces is another list. Who trained must not choose by leaving files away. What is compared is the bundle's own
ledger; states, boundaries and tokenizer come from the folder of the run, or states from a bundle that packs them.
`windows.py` says how is drawn, `replay.py` and `layer.py` what is compared.

Unlike every other check this one trains, under the recorded configuration: data are read from where it names them,
or from a folder of whoever verifies (`Means.data`). It is done only when asked for, on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullweight.audit import replay as replays
from fullweight.audit.again import Means
from fullweight.audit.claims import Verdict
from fullweight.audit.layer import LayerResult, repeat_layers, stored_pieces
from fullweight.audit.replay import ReplayResult, replay
from fullweight.audit.rule import NotCheckableError, Status
from fullweight.audit.subject import Subject
from fullweight.audit.windows import Window, candidates, draw
from fullweight.core.errors import FullweightError
from fullweight.evidence.ledger import finite
from fullweight.train.boundaries import INDEX

CLAIM = "replay"
_STATEMENT = "what was drawn after the ledger was sealed, taken again, gives what was recorded"
_STATUS = {
    replays.Verdict.verified: Status.holds,
    replays.Verdict.refuted: Status.refuted,
    replays.Verdict.unchecked: Status.not_checkable,
}


@dataclass(frozen=True)
class Replaying:
    """How much to take again, drawn with `beacon`: windows of steps, or single `layers`."""

    count: int
    beacon: str
    means: Means = field(default_factory=Means)
    layers: bool = False
    boundaries: Path | None = None  # of one step alone; without it, all that the run stored


@dataclass(frozen=True)
class Replayed:
    """What came of it; `candidates` is what was drawn from."""

    asked: Replaying
    head: str
    candidates: int
    results: tuple[ReplayResult | LayerResult, ...]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """For machines: everything that a repetition takes, and every difference."""
        asked, level = self.asked, "layer" if self.asked.layers else "step"
        drawn = {"level": level, "asked": asked.count, "beacon": asked.beacon, "head": self.head}
        return finite({**drawn, "candidates": self.candidates, "results": [asdict(r) for r in self.results]})


def taken_again(subject: Subject, asked: Replaying) -> Replayed:
    """Draw from what the bundle names, and take it again. Whatever stands in the way makes it not checkable."""
    head, among, results = subject.history.head, 0, list[ReplayResult | LayerResult]()
    try:
        if not asked.layers:
            windows = candidates([entry.step for entry in subject.checkpoints if entry.kept])
            among, drawn = len(windows), draw(windows, head, asked.beacon, asked.count)
            results += _windows(subject, drawn, asked)
        else:
            among, results = _layers(subject, asked)
        if not results:
            raise NotCheckableError("the bundle keeps no checkpoint to start from")
        verdict = _verdict(results, among)
    except (NotCheckableError, FullweightError) as error:
        verdict = Verdict(CLAIM, _STATEMENT, None, None, Status.not_checkable, str(error))
    return Replayed(asked, head, among, tuple(results), verdict)


def _windows(subject: Subject, drawn: Sequence[Window], asked: Replaying) -> list[ReplayResult]:
    folder, states = _places(subject)
    held = {entry.step for entry, _ in subject.at_hand()} | {0}
    whole = [window for window in drawn if {window.start, window.stop} <= held]
    found = {result.window: result for result in replay(folder, whole, asked.means, states=states)}
    for window in drawn:
        if window not in found:
            absent = min({window.start, window.stop} - held)
            reason = f"the state of step {absent} is not at hand, which the bundle calls kept"
            found[window] = ReplayResult(window, replays.Verdict.unchecked, reason)
    return [found[window] for window in drawn]


def _layers(subject: Subject, asked: Replaying) -> tuple[int, list[ReplayResult | LayerResult]]:
    """How many pieces there were to draw from, and what came of those that were drawn."""
    folder, states = _places(subject)
    if asked.boundaries is None and subject.run is None:
        raise NotCheckableError("no bundle holds boundaries: give the folder of the run with --run")
    if asked.boundaries is not None and not (asked.boundaries / INDEX).is_file():
        raise NotCheckableError(f"{asked.boundaries} has no {INDEX} that lists boundaries")
    given = [] if asked.boundaries is None else [asked.boundaries]
    kept = {entry.step for entry in subject.checkpoints if entry.kept}
    drawn, among = (asked.count, asked.beacon), len(stored_pieces(folder, given, states, kept))
    return among, [*repeat_layers(folder, given, asked.means, drawn=drawn, states=states, kept=kept)]


def _places(subject: Subject) -> tuple[Path, Path | None]:
    """The folder of the record, and that of the states where it is another."""
    if not subject.at_hand():
        raise NotCheckableError("no checkpoint is at hand: give the folder of the run with --run")
    return subject.bundle.root, subject.run


def _verdict(results: Sequence[ReplayResult | LayerResult], among: int) -> Verdict:
    if isinstance(results[0], LayerResult):
        value = f"{', '.join(_name(one) for one in results)} ({len(results)} of {among})"
    else:
        value = f"steps {', '.join(_name(one) for one in results)} ({len(results)} of {among})"
    judged = [(_status(one), one) for one in results]
    for status in (Status.refuted, Status.not_checkable):
        if first := next((one for found, one in judged if found is status), None):
            return Verdict(CLAIM, _STATEMENT, value, None, status, f"{_name(first)}: {_reason(first)}")
    return Verdict(CLAIM, _STATEMENT, value, None, Status.holds, "; ".join(map(_reason, results)))


def _name(one: ReplayResult | LayerResult) -> str:
    return str(one.window) if isinstance(one, ReplayResult) else f"{one.piece} of step {one.step}"


def _status(one: ReplayResult | LayerResult) -> Status:
    return _STATUS[one.verdict]


def _reason(one: ReplayResult | LayerResult) -> str:
    if isinstance(one, LayerResult) and one.failure is not None:
        return f"{one.failure}: {one.reason}"
    if isinstance(one, LayerResult) and not one.bound_in_ledger:
        return f"{one.reason}, of files that the ledger does not name: who made them said what could be drawn"
    return one.reason
