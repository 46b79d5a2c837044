"""A piece of a run repeated alone: its own weights from a kept state, what entered it from files.

A piece is the embedding, a layer, the MTP block or the head; the pieces of a pipeline's stage are repeated as
one. It is computed forward from what entered it, and backward from the gradient of what left it, row by row
through the step; then gradients are clipped by the global norm that the ledger has, and the optimisers take their
step from the kept moments. What leaves, the gradient of what entered, each parameter's gradient, the losses, and,
where the state after the step is kept, weights, router biases and moments must be as recorded: bit for bit on the
same stack, else within a bound. Memory is that of the piece and a row.

What it proves: these pieces did this to these numbers in this step, and that is where their weights after it come
from. That the numbers are the run's follows from neighbours that meet (`boundaries.joints`), rows with the
ledger's digest at one end, and a loss that is the ledger's at the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fullweight.audit.again import Means, config_at, threads
from fullweight.audit.boundaries import Boundary, Failure, Folder, Refused, joints
from fullweight.audit.piece import Again, Outcome, compared, relative, repeated
from fullweight.audit.recorded import Recorded
from fullweight.audit.replay import Verdict, default_bound
from fullweight.audit.windows import Window, draw
from fullweight.checkpoint.manifest import CorruptError, Generation, verify
from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.parts import parts_of, pieces, pieces_of
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.mesh import Ranks
from fullweight.parallel.stages import balanced_layers
from fullweight.train.boundaries import standing
from fullweight.train.run_folder import RunFolder


@dataclass(frozen=True)
class LayerResult:
    """How one piece, or a stage's, came out again; relative distances, where not 0, by what was compared.

    Of weights and gradients of parameters they are relative to those of all the piece's.
    """

    piece: str
    step: int
    verdict: Verdict
    reason: str  # one sentence
    failure: Failure | None = None
    num_bytes: int = 0  # of the piece's weights and buffers
    exact: bool = False
    after: bool = False  # whether weights and moments after the step were compared
    bound_in_ledger: bool = False  # whether the ledger names the files
    bound: float = 0.0  # that counts where bits may differ
    stack: tuple[str, ...] = ()  # why bits may differ from the recorded ones; empty: they must not
    distances: dict[str, float] = field(default_factory=dict)
    differing: tuple[str, ...] = ()  # what is not equal bit for bit, in the order of the pass


@dataclass(frozen=True)
class Setting:
    """What a folder's step is repeated under."""

    recorded: Recorded
    folder: Folder
    architecture: DeepSeekV4Config
    parallel: ParallelConfig
    row_tokens: int

    @property
    def pieces(self) -> tuple[str, ...]:
        return pieces(self.architecture.num_hidden_layers, self.architecture.num_nextn_predict_layers > 0)

    @property
    def line(self) -> dict[str, Any]:
        return self.recorded.steps.get(self.folder.step, {})

    def unit(self, name: str) -> tuple[str, ...]:
        """Pieces of a name: a piece, a layer's number, or stage-K. Raises ConfigError."""
        piece = f"layer-{name}" if name.isdecimal() else name.replace(" ", "-")
        if piece in self.pieces:
            return (piece,)
        with_mtp, stage = self.architecture.num_nextn_predict_layers > 0, piece.removeprefix("stage-")
        parts = parts_of(self._stage_layers())
        if piece.startswith("stage-") and stage.isdecimal() and int(stage) < len(parts):
            return pieces_of(parts[int(stage)], with_mtp)
        stages = f", and {len(parts)} stages: stage-0 to stage-{len(parts) - 1}" if len(parts) > 1 else ""
        raise ConfigError(f"there is no piece {name!r}; this model has {', '.join(self.pieces)}{stages}")

    def _stage_layers(self) -> Sequence[int]:
        count = self.parallel.pipeline * self.parallel.virtual_stages
        return self.parallel.stage_layers or balanced_layers(self.architecture, count, self.row_tokens)


def repeat_layers(
    root: Path,
    folders: Sequence[Path],
    means: Means,
    bound: float | None = None,
    *,
    chosen: Sequence[str] = (),
    drawn: tuple[int, str] | None = None,
    states: Path | None = None,
    kept: Collection[int] | None = None,
) -> list[LayerResult]:
    """Repeat pieces of the run in `root` whose boundaries lie in `folders` (none: all that the run itself stored).

    `chosen` names pieces, layers by number, or stages; `drawn` (how many, a public value) draws so many of
    `stored_pieces`, as windows are drawn; by default every piece that is stored. `states` is as of `replay`,
    `kept` as of `stored_pieces`. Neighbours among the stored pieces of a step must meet, whichever are repeated.

    Raises CheckpointError when nothing is stored, or the run cannot be read; ConfigError on a piece that there is
    not. What is wrong with a folder or piece is in its result.
    """
    recorded = Recorded.of(RunFolder(root), None if states is None else RunFolder(states))
    read, results = _read(recorded, folders)
    settings: dict[Path, Setting] = {}
    for folder in read:
        if folder.step - 1 not in recorded.kept():
            continue
        try:
            settings[folder.path] = _setting(recorded, folder)
        except Refused as refused:
            results.append(_refused(folder.path.name, folder.step, refused.failure, refused.reason))
            continue
        if (reason := _apart(settings[folder.path])) is not None:
            results.append(_refused("joints", folder.step, reason.failure, reason.reason))
    refuted = {one.step for one in results}
    lost = [one for one in read if one.path not in settings and one.step not in refuted]
    if drawn is not None:
        among = _candidates(recorded, read, kept)
        work = draw(among, recorded.head, drawn[1], drawn[0])
        lost = [] if among else lost  # what has no state is no candidate; without any, that is why
    else:
        whole = [folder for folder in read if folder.path in settings]
        work = [(folder, piece) for folder in whole for piece in chosen or _pieces(recorded, folder)]
    results += [_unchecked(recorded, folder, "all") for folder in lost]
    for folder, name in work:
        if (setting := settings.get(folder.path)) is not None:
            results.append(_one(setting, setting.unit(name), means, bound))
        elif folder.step not in refuted:
            results.append(_unchecked(recorded, folder, name))
    return results


def stored_pieces(
    root: Path, folders: Sequence[Path], states: Path | None = None, kept: Collection[int] | None = None
) -> list[tuple[Folder, str]]:
    """What can be drawn, in order: pieces of stored steps, only of those that the ledger names if it names any.

    A list whose root is not the ledger's is refuted and not drawn from. The state before the step must be kept: at
    hand, or, with `kept`, be of one of these steps, wherever it is.
    """
    recorded = Recorded.of(RunFolder(root), None if states is None else RunFolder(states))
    return _candidates(recorded, _read(recorded, folders)[0], kept)


def _candidates(
    recorded: Recorded, read: Sequence[Folder], kept: Collection[int] | None
) -> list[tuple[Folder, str]]:
    begins = recorded.kept() if kept is None else kept
    named = [folder for folder in read if folder.bound] or read
    once = {folder.step: folder for folder in reversed(named) if folder.step - 1 in begins}  # copies add nothing
    return [(once[step], piece) for step in sorted(once) for piece in _pieces(recorded, once[step])]


def _pieces(recorded: Recorded, folder: Folder) -> list[str]:
    """The model's pieces that a folder lists, in the order of the pass."""
    model = DeepSeekV4Config.from_published(recorded.manifest.model, str(recorded.folder.manifest))
    listed = set(folder.pieces())
    return [p for p in pieces(model.num_hidden_layers, model.num_nextn_predict_layers > 0) if p in listed]


def _read(recorded: Recorded, folders: Sequence[Path]) -> tuple[list[Folder], list[LayerResult]]:
    """The given folders, or all that the run stored, whose lists hold; and what is refuted of the others."""
    place = recorded.states.boundaries
    stored = sorted(place.glob("step-*"), key=lambda p: (len(p.name), p.name))
    told = {e["step"]: e for e in recorded.events if e.get("what") == "boundaries"}
    if not (paths := list(folders) or stored) and not told:
        raise CheckpointError(
            f"no boundaries are stored in {place}; a run stores them with boundaries.every, and "
            "`fullweight boundaries` takes a step of it again"
        )
    read: list[Folder] = []
    results: list[LayerResult] = []
    if not folders:
        gone = [step for step in told if place / told[step]["folder"] not in paths]
        results += [_gone(step, place / told[step]["folder"]) for step in gone]
    for path in paths:
        try:
            read.append(Folder.of(path, recorded))
        except Refused as refused:
            results.append(_refused(path.name, _step_of(path), refused.failure, refused.reason))
    return read, results


def _setting(recorded: Recorded, folder: Folder) -> Setting:
    step = folder.step - 1
    generation = _state(recorded, step)
    assert generation is not None
    facts = generation.manifest.facts
    config = recorded.segments(Window(step, step + 1), facts)[-1].config
    parallel = ParallelConfig.resolve(config.get("parallel", {}), "the run's parallel")
    architecture = DeepSeekV4Config.from_published(facts.model, str(generation.path))
    return Setting(recorded, folder, architecture, parallel, int(config["data"]["row_tokens"]))


def _state(recorded: Recorded, step: int) -> Generation | None:
    """The verified state of a step, None when none is kept. Raises Refused when it is not the run's."""
    path = recorded.kept().get(step)
    if path is None:
        return None
    try:
        generation = verify(path)
    except CorruptError as error:
        raise Refused(Failure.state, str(error)) from None
    if reason := recorded.why_not_its(generation):
        raise Refused(Failure.state, reason)
    return generation


def _apart(setting: Setting) -> Refused | None:
    """The first place where stored neighbours do not meet. What cannot be read is for its own result to tell."""
    found: dict[str, Boundary] = {}
    for piece in setting.folder.pieces():
        try:
            found[piece] = setting.folder.read(piece, setting.architecture.ratios, setting.line)
        except Refused:
            continue
    layers, streams = setting.architecture.num_hidden_layers, setting.architecture.hc_mult
    reasons = _reasons(next(iter(found.values())), "") if found else []
    for where, here, there in joints(found, layers, streams):
        # sums (of streams, of the head and the MTP block) may round otherwise on another processor
        distance = relative(here, there)
        if here.shape != there.shape or not (torch.equal(here, there) or (reasons and distance <= 1e-2)):
            return Refused(Failure.apart, f"{where}: what leaves and what enters are apart by {distance:.1e}")
    return None


def _one(setting: Setting, unit: tuple[str, ...], means: Means, bound: float | None) -> LayerResult:
    recorded, folder, step = setting.recorded, setting.folder, setting.folder.step
    name = unit[0] if len(unit) == 1 else f"{unit[0]} to {unit[-1]}"
    if not setting.line:
        return _refused(name, step, Failure.other_step, f"the ledger has no line of step {step}")
    try:
        start, end = _state(recorded, step - 1), _state(recorded, step)
        assert start is not None
        found = {p: folder.read(p, setting.architecture.ratios, setting.line) for p in _needed(setting, unit)}
        first = next(iter(found.values()))
        with _config(recorded, start, means, first) as config:
            again = repeated(unit, found, start, config, setting.line)
            reasons = tuple(_reasons(first, again.operations))
            bound = default_bound(start.manifest.facts.config, 1) if bound is None else bound
            outcome = compared(again, found, setting.line, (start, end), None if not reasons else bound)
    except Refused as refused:
        return _refused(name, step, refused.failure, refused.reason)
    return replace(
        _result(name, step, again, outcome, reasons),
        after=end is not None,
        bound_in_ledger=folder.bound,
        bound=bound,
        stack=reasons,
    )


def _result(name: str, step: int, again: Again, outcome: Outcome, reasons: tuple[str, ...]) -> LayerResult:
    exact = not outcome.differing
    largest = max(outcome.distances.values(), default=0.0)
    reason = outcome.reason or (
        "every bit is equal" if exact else f"largest relative distance {largest:.1e}, within the bound"
    )
    verdict = Verdict.verified if outcome.failure is None else Verdict.refuted
    return LayerResult(
        name,
        step,
        verdict,
        reason,
        failure=outcome.failure,
        num_bytes=again.num_bytes,
        exact=exact,
        stack=reasons,
        distances=outcome.distances,
        differing=outcome.differing,
    )


def _needed(setting: Setting, unit: Sequence[str]) -> list[str]:
    """The pieces whose files a unit needs: those at its ends."""
    ends = [unit[0], *(p for p in unit if p in ("embedding", "mtp", "head"))]
    last = [p for p in unit if p.startswith("layer-")][-1:]
    stored = setting.folder.pieces()
    wanted = dict.fromkeys([*ends, *last])
    return [p for p in unit if p in wanted and (p in stored or len(unit) == 1 or p in (unit[0], unit[-1]))]


@contextmanager
def _config(recorded: Recorded, start: Generation, means: Means, first: Boundary) -> Iterator[Any]:
    """The configuration of the step on one rank, under as many threads as when it was taken."""
    facts, alone = start.manifest.facts, Ranks(0, 1, torch.device("cpu"))
    segment = recorded.segments(Window(facts.step, facts.step + 1), facts)[-1]
    count = means.threads or first.stood_on.get("threads")
    with tempfile.TemporaryDirectory(dir=means.scratch) as scratch, threads(count):
        yield config_at(recorded, segment, facts, alone, Path(scratch), means)


def _reasons(boundary: Boundary, operations: str) -> list[str]:
    """Why bits may differ from those of the file, with these operations ("": whatever they were)."""
    here: Mapping[str, Any] = standing(operations or boundary.stood_on.get("operations", "")) | {"axes": {}}
    told = {"axes": "layout"}
    return [
        f"{told.get(n, n)}: {v} when recorded, {here.get(n)} here"
        for n, v in boundary.stood_on.items()
        if v != here.get(n)
    ]


def _unchecked(recorded: Recorded, folder: Folder, piece: str) -> LayerResult:
    kept = ", ".join(str(step) for step in sorted(recorded.kept())) or "none"
    reason = f"no state of step {folder.step - 1} is kept to start from; kept: {kept}"
    return LayerResult(piece, folder.step, Verdict.unchecked, reason, bound_in_ledger=folder.bound)


def _gone(step: int, folder: Path) -> LayerResult:
    """Of boundaries that the ledger names, and that were removed since: absent evidence contradicts nothing."""
    reason = f"the boundaries of step {step}, which the ledger names, are no longer at {folder}"
    return LayerResult("all", step, Verdict.unchecked, reason, bound_in_ledger=True)


def _step_of(path: Path) -> int:
    """The step that a folder's name says, 0 if none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def _refused(piece: str, step: int, failure: Failure, reason: str) -> LayerResult:
    return LayerResult(piece, step, Verdict.refuted, reason, failure=failure)
