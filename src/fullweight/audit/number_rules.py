"""Rules about the numbers of a ledger: each is held against others of the same line, its neighbours, the
configuration and the model, so that one changed number contradicts something."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from fullweight.audit.rule import NotCheckableError, rule
from fullweight.audit.subject import Settings, Subject
from fullweight.core.errors import ConfigError
from fullweight.evidence.lines import EventLine, Number, Peak, Placed, StepLine, begins
from fullweight.evidence.performance import quantile
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import Pairs, parameters_by_component
from fullweight.optim.schedule import lr_factor
from fullweight.planner.chips import chip, chip_names

_EXACT = 1e-9
"""Relative difference of the same float64 arithmetic in another order."""
_LATE_SECONDS, _LATE_SHARE = 0.05, 0.02
"""A step may seem longer than the time since the line before it by this much: there are two clocks."""
_IDLE_SECONDS, _IDLE_SHARE = 0.02, 0.3
"""Between the end of a step and its line, in the median over the run: recording takes milliseconds."""


@rule(
    "ledger.step-times",
    proves="no step took longer than the time since the line before it",
    cannot="",
)
def _step_times(subject: Subject) -> Iterator[str]:
    for before, placed, step in _consecutive(subject):
        gap = placed.line.time - before.line.time
        if step.total_seconds > gap * (1 + _LATE_SHARE) + _LATE_SECONDS:
            yield f"{_at(placed)}: {step.total_seconds:.3f} s, and only {gap:.3f} s since line {before.number}"


@rule(
    "ledger.idle",
    proves="the times of steps fill the time between their lines: steps were not called shorter than they were",
    cannot="times and clock that were shortened together: an outside time stamp is for that",
)
def _idle(subject: Subject) -> Iterator[str]:
    pairs = [
        (s.total_seconds, p.line.time - b.line.time)
        for b, p, s in _consecutive(subject)
        if isinstance(b.line, StepLine)
    ]
    if not pairs:
        return
    idle = quantile([gap - seconds for seconds, gap in pairs], 0.5)
    length = quantile([gap for _, gap in pairs], 0.5)
    if idle > _IDLE_SECONDS + _IDLE_SHARE * length:
        yield (
            f"between lines of consecutive steps pass {length:.3f} s in the median, and {idle:.3f} s are in no "
            "phase of a step: the steps are called shorter than they were"
        )


@rule("ledger.phases", proves="the phases of every step add up to its time", cannot="")
def _phases(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        parts = math.fsum(v for k, v in step.seconds.items() if k != "total")
        if not _same(parts, step.total_seconds):
            yield f"{_at(placed)}: phases add up to {parts:.6f} s, the total is {step.total_seconds:.6f} s"


@rule(
    "ledger.tokens",
    proves="real and padded tokens of every step fill its rows, and the running sum is the sum",
    cannot="",
)
def _tokens(subject: Subject) -> Iterator[str]:
    sums = {0: 0}
    for placed in subject.history.all:
        if begins(placed.line):
            sums = {step: total for step, total in sums.items() if step <= placed.line.step}
        if not isinstance(placed.line, StepLine):
            continue
        step, settings = placed.line, _settings(subject, placed)
        full = settings.train.rows_per_step * settings.data.row_tokens
        if step.tokens.real + step.tokens.padding != full:
            found = step.tokens.real + step.tokens.padding
            yield f"{_at(placed)}: {found:,} tokens in {settings.train.rows_per_step} rows that hold {full:,}"
        if step.tokens.trained > step.tokens.real:
            yield f"{_at(placed)}: {step.tokens.trained:,} trained tokens of {step.tokens.real:,}"
        so_far = sums.get(step.step - 1, 0) + step.tokens.real
        if step.tokens.so_far != so_far:
            yield f"{_at(placed)}: {step.tokens.so_far:,} tokens so far, {so_far:,} add up"
        sums[step.step] = so_far


@rule(
    "ledger.documents",
    proves="the query-key pairs of a step's documents are ones that so many real tokens in such rows can have, "
    "so tokens and FLOPs are of the same documents",
    cannot="tokens and pairs that were invented together: the data, or replay, is for that",
)
def _documents(subject: Subject) -> Iterator[str]:
    if subject.flops is None:
        raise NotCheckableError("model.json is of no model that FLOPs can be counted for here")
    for placed, step in _steps(subject):
        length, tokens, samples = _settings(subject, placed).data.row_tokens, step.tokens.real, step.batch.samples
        if tokens == 0 and samples == 0:
            continue
        if not samples <= tokens <= samples * length:
            yield f"{_at(placed)}: {tokens:,} real tokens in {samples:,} documents of at most {length:,}"
            continue
        least, most = _pairs_within(subject.flops.model, tokens, samples, length)
        for name, found in step.batch.pairs.model_dump().items():
            if not least[name] <= found <= most[name]:
                yield (
                    f"{_at(placed)}: {found:,} pairs ({name}), {tokens:,} real tokens in {samples:,} documents "
                    f"have {least[name]:,} to {most[name]:,}"
                )
                break


@rule("ledger.throughput", proves="tokens per second are real tokens over seconds", cannot="")
def _throughput(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        rate = step.tokens.real / step.total_seconds
        if not _same(rate, step.tokens_per_second):
            yield f"{_at(placed)}: {step.tokens_per_second:,.1f} tokens/s, tokens and seconds make {rate:,.1f}"


@rule(
    "ledger.flops",
    proves="FLOP/s are the FLOPs of the step's documents in this model, computed here, over its seconds; with "
    "frozen parameters, which train by the recipe's patterns",
    cannot="",
)
def _flops(subject: Subject) -> Iterator[str]:
    if subject.flops is None:
        raise NotCheckableError("model.json is of no model that FLOPs can be counted for here")
    known = False
    for placed, step in _steps(subject):
        flops = subject.flops(step)
        if flops is None:
            continue
        known = True
        if step.mfu_convention != subject.flops.convention:
            yield f"{_at(placed)}: its FLOPs are of another convention than goes with what the recipe trains"
        if not _same(flops / step.total_seconds, step.model_flops_per_second):
            yield (
                f"{_at(placed)}: {step.model_flops_per_second:.6g} FLOP/s, its documents make "
                f"{flops / step.total_seconds:.6g}"
            )
    if not known:
        raise NotCheckableError("the run counts FLOPs by a convention that is unknown here")


@rule("ledger.mfu", proves="MFU is FLOP/s over the peak, in every step", cannot="")
def _mfu(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        share = step.model_flops_per_second / step.peak.flops_per_second
        if not _same(share, step.mfu):
            yield f"{_at(placed)}: MFU {step.mfu:.6f}, {share:.6f} follows from FLOP/s and peak"


@rule(
    "ledger.peak",
    proves="the peak is the one that the segment began with, and for a known accelerator not below 0.4 of the "
    "data sheet's nor above it",
    cannot="a measured peak of a machine that is in no table",
)
def _peak(subject: Subject) -> Iterator[str]:
    peaks: dict[int, Peak] = {}
    for placed in subject.history.all:
        line = placed.line
        if isinstance(line, EventLine) and begins(line):
            stated = line.get("peak")
            if not isinstance(stated, dict):
                yield f"{_at(placed)}: it states no peak"
                continue
            found = _peak_of(stated)
            if found is None:
                yield f"{_at(placed)}: its peak is none"
                continue
            peaks[placed.segment] = found
            if placed.segment == 0 and not _equal(found, subject.manifest.peak):
                stated_first = subject.manifest.peak.flops_per_second
                yield f"{_at(placed)}: peak {found.flops_per_second:.6g}, the manifest has {stated_first:.6g}"
            if reason := _against_table(line, found, subject.manifest.layout.ranks):
                yield f"{_at(placed)}: {reason}"
        elif (
            isinstance(line, StepLine) and placed.segment in peaks and not _equal(line.peak, peaks[placed.segment])
        ):
            own = peaks[placed.segment].flops_per_second
            yield f"{_at(placed)}: peak {line.peak.flops_per_second:.6g}, its segment began with {own:.6g}"


@rule(
    "ledger.learning-rate",
    proves="the learning rate of every step is the one of the configured schedule",
    cannot="that the optimiser used it: replay is for that",
)
def _learning_rate(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        settings = _settings(subject, placed)
        try:
            factor = lr_factor(settings.schedule, step.step - 1, settings.train.num_steps)
        except ConfigError as error:
            yield f"{_at(placed)}: the schedule cannot be followed: {error}"
            return
        expected = settings.optimizer.learning_rate * factor
        if not _same(expected, step.learning_rate):
            yield f"{_at(placed)}: learning rate {step.learning_rate:.6g}, the schedule has {expected:.6g}"


@rule(
    "ledger.losses",
    proves="every loss has the bits that stand beside it, and the total is their weighted sum",
    cannot="a loss that was changed in both places: chain, signature and replay are for that",
)
def _losses(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        values = {**step.loss, "total": step.total_loss}
        if problem := next((n for n in values if step.loss_hex.get(n, "") != fp32_hex(values[n])), None):
            bits, beside = fp32_hex(values[problem]), step.loss_hex.get(problem, "nothing")[:16]
            yield f"{_at(placed)}: loss {problem} {values[problem]} has the bits {bits}, beside it stands {beside}"
        coefficients = _settings(subject, placed).train.loss
        total = sum(coefficients.coefficient(n) * float(v) for n, v in step.loss.items())
        if not _same(total, float(step.total_loss), relative=1e-6) and math.isfinite(total):
            yield f"{_at(placed)}: total loss {step.total_loss}, its components come to {total:.6f}"


@rule(
    "ledger.skips",
    proves="a step with a loss or gradient that is no number is told as skipped",
    cannot="",
)
def _skips(subject: Subject) -> Iterator[str]:
    for placed, step in _steps(subject):
        finite = all(math.isfinite(float(v)) for v in (*step.loss.values(), step.grad_norm, step.total_loss))
        if not finite and step.skipped is None:
            yield f"{_at(placed)}: a loss or the gradient is no number, and the step counts as taken"


@rule(
    "ledger.routing",
    proves="routing is natural in every step by the run's own word, and the experts' load is not the even one "
    "that forced routing gives",
    cannot="a forcing that imitates an uneven load: replay is for that",
)
def _routing(subject: Subject) -> Iterator[str]:
    even = steps = 0
    for placed, step in _steps(subject):
        if step.routing != "natural":
            yield f"{_at(placed)}: routing is {step.routing[:40]!r}"
        mean = _mean_load(subject, step)
        if mean is not None and step.experts.max_over_mean > 0:
            steps += 1
            even += step.experts.max_over_mean <= math.ceil(mean) / mean * (1 + _EXACT)
    if steps and even == steps:
        yield f"in all {steps} steps every expert of every layer had the same load: routing was forced"


@rule(
    "ledger.parameters",
    proves="the numbers of parameters are those of the model and of what the recipe trains, in manifest and steps "
    "alike",
    cannot="that each was trained: coverage is for that",
)
def _parameters(subject: Subject) -> Iterator[str]:
    stated = subject.manifest.parameters
    if subject.flops is not None:
        counted = sum(parameters_by_component(subject.flops.model).values())
        if stated.total != counted:
            yield f"the manifest has {stated.total:,} parameters, model.json makes {counted:,}"
        if stated.trained != subject.flops.trained.elements:
            chosen = subject.flops.trained.elements
            yield f"the manifest has {stated.trained:,} trained parameters, the recipe trains {chosen:,}"
    for placed, step in _steps(subject):
        if (step.parameters.total, step.parameters.trained) != (stated.total, stated.trained):
            own = step.parameters
            yield (
                f"{_at(placed)}: {own.trained:,} of {own.total:,} parameters train, the manifest has "
                f"{stated.trained:,} of {stated.total:,}"
            )


def fp32_hex(value: Number) -> str:
    """The bits of a number rounded to fp32, big-endian."""
    number = float(value)
    try:
        return struct.pack(">f", number).hex()
    except OverflowError:
        return struct.pack(">f", math.copysign(math.inf, number)).hex()


def _pairs_within(
    model: DeepSeekV4Config, tokens: int, documents: int, longest: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Fewest and most pairs of so many documents together.

    The pairs of a document grow with its length and never slower, so documents of one length have the fewest, and
    a few of the longest beside ones of a single token the most.
    """
    each, over = divmod(tokens, documents)
    even = [(each, documents - over), (each + 1, over)]
    full, rest = divmod(tokens - documents, longest - 1) if longest > 1 else (0, 0)
    uneven = [(longest, full), (rest + 1, 1 if full < documents else 0), (1, max(documents - full - 1, 0))]
    return _sum_pairs(model, even), _sum_pairs(model, uneven)


def _sum_pairs(model: DeepSeekV4Config, documents: list[tuple[int, int]]) -> dict[str, int]:
    total = dict.fromkeys(("window", "csa_selected", "csa_visible", "hca"), 0)
    for length, count in documents:
        pairs = Pairs.of(model, [length])
        for name in total:
            total[name] += count * getattr(pairs, name)
    return total


def _mean_load(subject: Subject, step: StepLine) -> float | None:
    if subject.flops is None:
        return None
    model = subject.flops.model
    return step.tokens.real * model.num_experts_per_tok / model.n_routed_experts or None


def _against_table(event: EventLine, peak: Peak, ranks: int) -> str | None:
    """Why a peak cannot be that of the chip that the event names; None for chips that are in no table."""
    device = event.get("device")
    name = str(device.get("chip", "")).lower() if isinstance(device, dict) else ""
    words = name.replace("-", " ").split()
    known = [n for n in chip_names() if all(part in words for part in n.split("-"))]
    if not known:
        return None
    sheet = max(chip(n).bf16_tflops for n in known) * 1e12 * ranks
    if not 0.4 * sheet <= peak.flops_per_second <= sheet * 1.1:
        return f"peak {peak.flops_per_second:.4g} FLOP/s on {ranks} rank(s), the data sheet says {sheet:.4g}"
    return None


def _peak_of(values: dict[str, object]) -> Peak | None:
    rate, source = values.get("flops_per_second"), values.get("source")
    if not isinstance(rate, int | float) or not isinstance(source, str) or not 0 < rate <= 1e30:
        return None
    return Peak(flops_per_second=float(rate), source=source)


def _equal(first: Peak, second: Peak) -> bool:
    return (first.flops_per_second, first.source) == (second.flops_per_second, second.source)


def _consecutive(subject: Subject) -> Iterator[tuple[Placed, Placed, StepLine]]:
    """(line before, line, its step) of every step but those that begin a ledger."""
    for before, placed in zip(subject.history.all, subject.history.all[1:], strict=False):
        if isinstance(placed.line, StepLine):
            yield before, placed, placed.line


def _steps(subject: Subject) -> Iterator[tuple[Placed, StepLine]]:
    """Every step that was recorded, superseded ones too."""
    for placed in subject.history.all:
        if isinstance(placed.line, StepLine):
            yield placed, placed.line


def _settings(subject: Subject, placed: Placed) -> Settings:
    return subject.settings[min(max(placed.segment, 0), len(subject.settings) - 1)]


def _same(first: float, second: float, relative: float = _EXACT) -> bool:
    return math.isclose(first, second, rel_tol=relative, abs_tol=1e-12)


def _at(placed: Placed) -> str:
    return f"ledger line {placed.number} (step {placed.line.step})"
