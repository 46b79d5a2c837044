"""Repeating a window of a recorded run from a kept state, with its configuration and its data, and comparing.

The steps are those of training itself (`train.loop.one_step`), in a temporary folder; the recorded run is only
read. On the same stack (`stack.py`) every value and every bit of the state at the window's end must be equal. On
another one, losses and weights must be within a bound that rounding keeps and what is worth faking does not
(docs/evidence.md has the measurements). Which experts and entries a token takes can be so nearly tied that
rounding decides it, and then honest steps are further apart. So a window beyond the bound is repeated a few times
more, its first weights nudged by a rounding each time: when one of these is within the bound of the record, the
record is one of the outcomes of these steps. The bound stays; what ties could only explain is not checkable there.

What a window shows: these steps, from that state, with these data, give what was recorded. Not that the state it
starts from was made by training (draw more windows), nor that nothing else was trained in secret.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fullweight.audit.again import Again, Means, repeat
from fullweight.audit.lines import Divergence, beyond, divergences
from fullweight.audit.recorded import Recorded
from fullweight.audit.states import StateDistance, distance, first_beyond
from fullweight.audit.windows import Window
from fullweight.checkpoint.manifest import CorruptError, Generation, verify
from fullweight.checkpoint.peers import Peers
from fullweight.core.errors import FullweightError
from fullweight.evidence.state_root import StateRoot, stored_root
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.parallel.mesh import Ranks
from fullweight.train.config import RunConfig
from fullweight.train.loop import joined_for, load_config
from fullweight.train.run_folder import RunFolder

TENSOR_BOUND = 0.3
"""Of one tensor's effect; a matrix that one step in two left as it was is at 0.5."""
_LEAST_SHARE = 1e-2  # of the bound: what a tensor must contribute to be judged on its own
NUDGES = (1, 2, 3, 4)
"""Bits that are turned in turn: one to four units in a weight's last place, as much as rounding adds up to."""
_SPREADS = 4.0  # how many times the spread of such outcomes a record may be away and still be one that was not met
_TIES = 30.0  # times the bound: no tie of single tokens puts a window further; one of 512 put it at 3


def default_bound(config: dict[str, Any], num_steps: int) -> float:
    """What is taken for rounding on another stack, of weights by effect, moments, losses and gradient norms.

    `config` is the run's. In bf16 rounding grows with every step; docs/evidence.md has the measurements.
    """
    optimizer = config["optimizer"]
    rounds = config["train"]["precision"] == "bf16"
    rounds |= optimizer["name"] == "muon" and optimizer["muon"]["ns_dtype"] == "bfloat16"
    return max(1e-2, 5e-3 * num_steps) if rounds else 1e-3


class Verdict(StrEnum):
    """What a replay says of a window."""

    verified = "verified"
    refuted = "refuted"
    unchecked = "not checkable"


class Agreement(StrEnum):
    """How closely a replay came to the record."""

    exact = "bit-exact"
    bounded = "within the bound"
    none = "neither"


@dataclass(frozen=True)
class ReplayResult:
    """One window. What was not reached is None or empty."""

    window: Window
    verdict: Verdict
    reason: str  # one sentence
    bound: float = 0.0  # that counts where bits may differ
    stack: tuple[str, ...] = ()  # why bits may differ from the recorded ones; empty: they must not
    agreement: Agreement | None = None
    divergence: Divergence | None = None  # the first that counts
    tensor: str | None = None  # the first, in the model's order, that counts
    differing: tuple[Divergence, ...] = ()  # every value that is not equal bit for bit
    distance: StateDistance | None = None  # None without a kept state at the window's end
    roots: tuple[StateRoot, StateRoot] | None = None  # of the recorded state at the end and of the replayed one
    seconds: float = 0.0
    nudge: int = 0  # bits that were turned in the first weights of the repetition that this tells of


@dataclass(frozen=True)
class _Size:
    """How far two outcomes of a window are apart: largest of losses and norms, effect, moments, largest tensor."""

    losses: float
    effect: float
    moments: float
    tensor: float

    @staticmethod
    def of(differing: Sequence[Divergence], apart: StateDistance | None, bound: float) -> _Size:
        """Infinite where something differs that no rounding makes differ."""
        far = max(
            (math.inf if d.relative is None else d.relative for d in beyond(list(differing), bound)), default=0.0
        )
        if apart is None:
            return _Size(far, 0.0, 0.0, 0.0)
        counted = [d for d in apart.tensors if d.note is not None or d.share > _LEAST_SHARE * bound]
        tensor = max((math.inf if d.effect is None else d.effect for d in counted), default=0.0)
        return _Size(far, apart.effect, apart.moments, tensor)

    def within(self, other: _Size, times: float) -> bool:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(mine <= times * theirs for mine, theirs in pairs)


def replay(
    root: Path,
    windows: Sequence[Window],
    means: Means,
    bound: float | None = None,
    states: Path | None = None,
) -> list[ReplayResult]:
    """Repeat windows of the run in folder `root`; all ranks call it together and all get the results.

    `bound` is the relative distance that is rounding on another stack (by default `default_bound`); `states` is
    the folder of the run where `root` is its bundle, without the states.

    Raises FullweightError when the folder is no whole run; what is wrong with a window is in its result.
    """
    recorded = Recorded.of(RunFolder(root), None if states is None else RunFolder(states))
    with joined_for(_config(recorded, means)) as ranks:
        return [_window(recorded, window, ranks, means, bound) for window in windows]


def _config(recorded: Recorded, means: Means) -> RunConfig:
    """What the ranks meet under: the run's own configuration, but for the device that was asked for."""
    config = load_config(recorded.folder)
    if means.device is None:
        return config
    values = config.model_dump(mode="json")
    return RunConfig.resolve(
        {**values, "train": {**values["train"], "device": means.device}}, str(recorded.folder.config)
    )


def _window(recorded: Recorded, window: Window, ranks: Ranks, means: Means, bound: float | None) -> ReplayResult:
    began, peers = time.perf_counter(), Peers()
    if bound is None:
        config = RunConfig.resolve(recorded.manifest.config, str(recorded.folder.manifest))
        bound = default_bound(config.model_dump(mode="json"), len(window.steps))
    blank = ReplayResult(window, Verdict.refuted, "", bound)
    try:
        start, end = (_kept(recorded, step) for step in (window.start, window.stop))
    except CorruptError as error:
        return replace(blank, reason=str(error))
    refusal = peers.on_main(lambda: _refusal(recorded, window, start, end))
    if refusal is not None:
        return replace(blank, reason=refusal)
    if start is None and window.start > 0:
        kept = ", ".join(str(step) for step in sorted(recorded.kept())) or "none"
        reason = f"no state of step {window.start} is kept to start from; kept: {kept}"
        return replace(blank, verdict=Verdict.unchecked, reason=reason)
    with _scratch(ranks, means.scratch) as folder:
        try:
            again = repeat(recorded, window, start, ranks, folder, means)
        except FullweightError as error:
            return replace(blank, verdict=Verdict.unchecked, reason=str(error))
        judged = peers.on_main(lambda: _judged(recorded, again, end, blank))
        if judged.verdict is Verdict.refuted and judged.stack:
            judged = _nudged(recorded, window, start, end, ranks, folder, means, again, judged)
    return replace(judged, seconds=time.perf_counter() - began)


def _nudged(
    recorded: Recorded,
    window: Window,
    start: Generation | None,
    end: Generation | None,
    ranks: Ranks,
    folder: Path,
    means: Means,
    plain: Again,
    judged: ReplayResult,
) -> ReplayResult:
    """What to make of a window beyond the bound, when rounding may have decided what is nearly tied; all ranks."""
    peers, blank = Peers(), ReplayResult(window, Verdict.refuted, "", judged.bound)
    found = _Size.of(judged.differing, judged.distance, judged.bound)
    if max(found.losses, found.effect, found.moments) > _TIES * judged.bound or found.tensor == math.inf:
        return judged
    spread = _Size(0.0, 0.0, 0.0, 0.0)
    for bits in NUDGES:
        inner = folder / f"nudged-{bits}"
        peers.on_main(partial(inner.mkdir))
        again = repeat(recorded, window, start, ranks, inner, replace(means, nudge=bits))
        other = peers.on_main(partial(_judged, recorded, again, end, blank))
        if other.verdict is Verdict.verified:
            told = f"{other.reason}, once the weights were nudged by a rounding, which decides a near tie"
            return replace(other, reason=told, nudge=bits)
        spread = _wider(spread, peers.on_main(partial(_apart, plain, again, judged.bound)))
        peers.on_main(partial(shutil.rmtree, inner, ignore_errors=True))
    if not found.within(spread, _SPREADS):
        return judged
    told = (
        f"{judged.reason}; but weights nudged by a rounding give outcomes as far apart (by effect "
        f"{spread.effect:.1e}, moments {spread.moments:.1e}): near ties decide here. Repeat a shorter window, or "
        "repeat it on the same stack"
    )
    return replace(judged, verdict=Verdict.unchecked, reason=told, divergence=None, tensor=None)


def _apart(plain: Again, nudged: Again, bound: float) -> _Size:
    """How far two repetitions are apart; on this rank alone."""
    pairs = enumerate(zip(plain.records, nudged.records, strict=True))
    differing = [d for step, (a, b) in pairs for d in divergences({**a, "step": step}, b)]
    architecture = DeepSeekV4Config.from_published(plain.end.manifest.facts.model, str(plain.end.path))
    return _Size.of(differing, distance(plain.end, nudged.end, plain.start, *_modules(architecture)), bound)


def _wider(a: _Size, b: _Size) -> _Size:
    return _Size(*(max(pair) for pair in zip(astuple(a), astuple(b), strict=True)))


def _kept(recorded: Recorded, step: int) -> Generation | None:
    """The verified generation of a step; all ranks together. Raises CorruptError."""
    path = recorded.kept().get(step)
    return None if path is None else verify(path, Peers())


def _refusal(recorded: Recorded, window: Window, start: Generation | None, end: Generation | None) -> str | None:
    """What contradicts the record before anything is repeated."""
    for generation in (start, end):
        if generation is not None and (reason := recorded.why_not_its(generation)):
            return reason
    absent = [step for step in window.steps if step not in recorded.steps]
    return f"the ledger has no line of step {absent[0]}" if absent else None


def _judged(recorded: Recorded, again: Again, end: Generation | None, blank: ReplayResult) -> ReplayResult:
    """Compare on this rank alone what was recorded with what came out."""
    pairs = zip(blank.window.steps, again.records, strict=True)
    differing = tuple(d for step, record in pairs for d in divergences(recorded.steps[step], record))
    apart = roots = None
    if end is not None:
        architecture = DeepSeekV4Config.from_published(end.manifest.facts.model, str(end.path))
        apart = distance(end, again.end, again.start, *_modules(architecture))
        roots = stored_root(end), stored_root(again.end)
    result = replace(blank, stack=again.stack, differing=differing, distance=apart, roots=roots)
    exact = not differing and (end is None or roots is None or _same_state(end, again.end, roots, blank.window))
    far = beyond(list(differing), blank.bound)
    tensor = None if apart is None else first_beyond(apart.tensors, TENSOR_BOUND, _LEAST_SHARE * blank.bound)
    near = apart is None or (apart.effect <= blank.bound and apart.moments <= blank.bound)
    bounded = not far and tensor is None and near
    agreement = Agreement.exact if exact else Agreement.bounded if bounded else Agreement.none
    if exact or (again.stack and bounded):
        reason = f"{_compared(result)}: {_how_close(result, agreement)}"
        return replace(result, verdict=Verdict.verified, agreement=agreement, reason=reason)
    if not again.stack:  # every bit counts
        far, tensor = list(differing), next(iter(() if apart is None else apart.tensors), None)
    elif tensor is None and apart is not None and not near:
        tensor = max(apart.tensors, key=lambda d: d.share)
    result = replace(
        result,
        agreement=agreement,
        divergence=far[0] if far else None,
        tensor=None if tensor is None else tensor.name,
    )
    return replace(result, reason=f"{_compared(result)}: {_what_diverged(result)}")


def _same_state(
    recorded: Generation, replayed: Generation, roots: tuple[StateRoot, StateRoot], window: Window
) -> bool:
    """Equal roots; from the beginning but for generators, which the start of a run draws from too."""
    if window.start > 0:
        return roots[0] == roots[1]
    parts = [{**root.parts, "random": ""} for root in roots]
    return parts[0] == parts[1] and recorded.manifest.facts.position == replayed.manifest.facts.position


def _modules(architecture: DeepSeekV4Config) -> tuple[list[str], dict[str, int]]:
    """Names of the model's tensors in a training state, in its order; how many matrices each parameter stacks."""
    with torch.device("meta"):
        model = DeepSeekV4(architecture)
    matrices = {f"model.{name}": role.num_matrices for name, role in model.parameter_roles().items()}
    return [f"model.{name}" for name in model.state_dict()], matrices


def _compared(result: ReplayResult) -> str:
    count = len(result.window.steps)
    steps = f"{count} step{'s' if count != 1 else ''}"
    if result.distance is None:
        return f"{steps} repeated, and no state is kept of step {result.window.stop} to compare"
    return f"{steps} repeated, with the state at the end"


def _how_close(result: ReplayResult, agreement: Agreement) -> str:
    if agreement is Agreement.exact:
        return "every value and every bit is equal"
    largest = max((d.relative or 0.0 for d in result.differing if d.relative is not None), default=0.0)
    told = f"losses within {largest:.1e}"
    return told if result.distance is None else f"{_distances(result.distance)}, {told}"


def _distances(found: StateDistance) -> str:
    return f"weights by effect {found.effect:.1e} ({found.weights:.1e} as they are), moments {found.moments:.1e}"


def _what_diverged(result: ReplayResult) -> str:
    parts = []
    if result.divergence is not None:
        parts.append(f"first divergence at {result.divergence}")
    if result.tensor is not None and result.distance is not None:
        by_name = {d.name: d for d in result.distance.tensors}
        found = by_name[result.tensor]
        size = found.note or f"relative distance {found.relative:.1e}"
        size += "" if found.effect is None else f", by effect {found.effect:.1e}"
        parts.append(f"first divergent tensor {result.tensor} ({size})")
    if result.distance is not None:
        held_to = f"the bound is {result.bound:.0e}" if result.stack else "every bit must be equal"
        parts.append(f"{_distances(result.distance)}, {held_to}")
    if result.divergence is None and result.tensor is None:
        parts.insert(0, "the states differ in the place in the data or in random generators alone")
    return "; ".join(parts)


@contextmanager
def _scratch(ranks: Ranks, parent: Path | None) -> Iterator[Path]:
    """A temporary folder that all ranks see and that is gone afterwards."""
    made: str | None = None
    with ranks.main_first_failure():
        if ranks.is_main:
            made = tempfile.mkdtemp(prefix="fullweight-replay-", dir=parent)
    folder = Path(ranks.broadcast(made))
    try:
        yield folder
    finally:
        ranks.barrier()
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
