"""What a run achieved, from the lines of its ledger and the sizes of its model alone.

Nothing that a line calls a rate is believed: tokens per second come from tokens and seconds, and FLOP/s from the
tokens and query-key pairs of documents by the arithmetic of `models/deepseek_v4/flops.py`. The first steps, which
are slower, count like all others. What was interrupted counts in the wall time, from the first line to the last.

- step time: wall time of a step, data included, of every step that stands.
- MFU: FLOPs of all steps that stand, divided by their time and by the peak that the run states.
- goodput: time of the steps that stand and changed the weights, over wall time. Evaluation, saving, start-up, what
  was lost to an interruption and what was done twice are the rest. Unknown where the clock was set back between
  two segments, for nobody knows then how long the interruption was.
- energy: watts times seconds of every step that was recorded, done twice or not; unknown as soon as one step's is.

Left out: where the time of a step goes inside a phase (a profile shows that).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fullweight.checkpoint.selection import ALL, Trained, trained
from fullweight.core.errors import ConfigError, FullweightError
from fullweight.evidence.lines import EvalLine, History, StepLine
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import IndexerLoss, Pairs, choice_flops, pairs_flops

CONVENTION = "exact sparse model FLOPs, forward and backward, no recompute, no padding; wall time"
"""As ledgers name the figure of a run in which every parameter trains."""
FROZEN_CONVENTION = (
    "exact sparse model FLOPs, forward, and backward of trained indexers alone: with other parameters frozen in "
    "part a lower bound; no recompute, no padding; wall time"
)
"""As ledgers name it where a recipe freezes something."""
_MOST_NAMES, _MOST_PATTERNS = 5_000_000, 1000
"""Experts, and patterns of names, up to which a stranger's configuration is followed; far beyond any model's."""


class FlopsRule:
    """How many FLOPs a step of a run has, from the documents it saw; None where the ledger cannot say."""

    def __init__(
        self, model: DeepSeekV4Config, trained: Trained, indexer_loss: IndexerLoss, dense_csa: bool
    ) -> None:
        self.model, self.trained, self._dense_csa = model, trained, dense_csa
        self._indexer_loss: IndexerLoss = indexer_loss if trained.indexers else "none"

    @property
    def convention(self) -> str:
        """What a step's FLOPs count, by what the recipe trains."""
        return CONVENTION if self.trained.everything else FROZEN_CONVENTION

    @classmethod
    def of(cls, model: Mapping[str, Any], config: Mapping[str, Any]) -> FlopsRule | None:
        """From the published config and the resolved one of the run; None when a model cannot be made of it."""
        try:
            train = config["train"]
            architecture = DeepSeekV4Config.from_published(dict(model))
            chosen = _trained(architecture, train["trainable"], train["frozen"])
            return cls(architecture, chosen, train["indexer_loss"], train["csa_attention"] == "visible")
        except (FullweightError, KeyError, TypeError):
            return None

    def __call__(self, step: StepLine) -> int | None:
        """FLOPs of a step; None when it counts them by a convention that is unknown here."""
        if step.mfu_convention not in (CONVENTION, FROZEN_CONVENTION):
            return None
        pairs = step.batch.pairs
        counts = Pairs(step.tokens.real, pairs.window, pairs.csa_selected, pairs.csa_visible, pairs.hca)
        found = pairs_flops(self.model, counts, indexer_loss=self._indexer_loss, dense_csa=self._dense_csa)
        dropped = step.experts.dropped * choice_flops(self.model)
        if self.trained.everything:
            return found.total - 3 * dropped
        return found.partly_frozen - dropped


def _trained(model: DeepSeekV4Config, trainable: Sequence[str], frozen: Sequence[str]) -> Trained:
    """What patterns choose. Raises ConfigError when they are none, or more than any model's."""
    experts = (model.num_hidden_layers + model.num_nextn_predict_layers) * model.n_routed_experts
    plain = tuple(trainable) == ALL and not frozen
    if not plain and (experts > _MOST_NAMES or len(trainable) + len(frozen) > _MOST_PATTERNS):
        raise ConfigError(
            f"{experts:,} experts and {len(trainable) + len(frozen):,} patterns are too many to follow"
        )
    return trained(model, trainable, frozen)


def performance(history: History, flops: FlopsRule | None) -> dict[str, Any]:
    """All figures, as `performance.json` holds them; what cannot be said is None with a reason beside it."""
    steps = history.steps
    seconds = [s.total_seconds for s in steps]
    total = math.fsum(seconds)
    tokens = sum(s.tokens.real for s in steps)
    return {
        "steps": len(steps),
        "skipped": sum(s.skipped is not None for s in steps),
        "tokens": {
            "real": tokens,
            "padding": sum(s.tokens.padding for s in steps),
            "trained": math.fsum(s.tokens.trained for s in steps),
        },
        "step_seconds": distribution(seconds),
        "tokens_per_second": {
            "overall": tokens / total,
            **_quantiles([s.tokens.real / s.total_seconds for s in steps]),
        }
        if steps
        else None,
        "mfu": _mfu(steps, flops, total),
        "time_to_loss": _time_to_loss(history),
        "data_wait": _share(math.fsum(s.seconds.get("data", 0.0) for s in steps), total),
        "goodput": goodput(history),
        "energy": _energy(history, tokens),
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Count, first, mean, extremes, median, p5 and p95 (linear between order statistics); None of nothing."""
    if not values:
        return None
    return {
        "count": len(values),
        "first": values[0],
        "mean": math.fsum(values) / len(values),
        "smallest": min(values),
        "largest": max(values),
        **_quantiles(values),
    }


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which a share of the values lies, linear between neighbours.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def goodput(history: History) -> dict[str, Any]:
    """Productive seconds over wall seconds, with what the rest is of; None where the clock was set back."""
    productive = math.fsum(s.total_seconds for s in history.steps if s.skipped is None)
    recorded = [p for p in history.all if isinstance(p.line, StepLine)]
    repeated = math.fsum(p.line.total_seconds for p in recorded if p.superseded and isinstance(p.line, StepLine))
    wall = history.wall_seconds
    return {
        "productive_seconds": productive,
        "wall_seconds": wall,
        "superseded_seconds": repeated,
        "superseded_steps": sum(p.superseded for p in recorded),
        "interruptions": history.all[-1].segment,
        "share": productive / wall if wall else None,
        "reason": set_back(history),
    }


def set_back(history: History) -> str | None:
    """Why wall time is not known, or None when it is."""
    if not history.set_back:
        return None
    first = history.set_back[0]
    back = history.all[first.number - 2].line.time - first.line.time
    return (
        f"ledger line {first.number} (step {first.line.step}) begins a segment {back:.3f} s before the line "
        "before it: the clock was set back between segments, so the time between them is not known"
    )


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: quantile(values, share) for name, share in (("median", 0.5), ("p5", 0.05), ("p95", 0.95))}


def _mfu(steps: Sequence[StepLine], flops: FlopsRule | None, total: float) -> dict[str, Any]:
    unknown = {"overall": None, "median": None, "p5": None, "p95": None}
    if not steps:
        return {**unknown, "reason": "no step"}
    found = [flops(s) for s in steps] if flops is not None else []
    known = [f for f in found if f is not None]
    if flops is None or len(known) != len(steps):
        return {
            **unknown,
            "reason": "FLOPs of a convention that is unknown here cannot be recomputed from the ledger",
        }
    possible = math.fsum(s.total_seconds * s.peak.flops_per_second for s in steps)
    shares = [f / s.total_seconds / s.peak.flops_per_second for f, s in zip(known, steps, strict=True)]
    return {
        "overall": sum(known) / possible,
        **_quantiles(shares),
        "flops": sum(known),
        "flops_per_second": sum(known) / total,
        "convention": flops.convention,
        "peaks": sorted({(s.peak.flops_per_second, s.peak.source) for s in steps}),
    }


def _time_to_loss(history: History) -> list[dict[str, Any]]:
    """When each new lowest held-out loss was reached: wall time since the first line (None behind a clock that was
    set back), and time of steps so far."""
    first, best, found = history.all[0].line.time, math.inf, []
    spent, tokens = 0.0, 0
    unknown_from = history.set_back[0].number if history.set_back else math.inf
    for placed in history.live:
        line = placed.line
        if isinstance(line, StepLine):
            spent, tokens = spent + line.total_seconds, tokens + line.tokens.real
        if not isinstance(line, EvalLine) or not line.loss:
            continue
        value = line.loss.get("lm", line.total_loss)
        if isinstance(value, int | float) and value < best:
            best = value
            found.append(
                {
                    "loss": value,
                    "step": line.step,
                    "wall_seconds": line.time - first if placed.number < unknown_from else None,
                    "step_seconds": spent,
                    "tokens": tokens,
                }
            )
    return found


def _share(seconds: float, total: float) -> dict[str, float | None]:
    return {"seconds": seconds, "share": seconds / total if total > 0 else None}


def _energy(history: History, tokens: int) -> dict[str, Any]:
    recorded = [p.line for p in history.all if isinstance(p.line, StepLine)]
    watts = [(s.power.watts, s.total_seconds) for s in recorded]
    known = [(w, t) for w, t in watts if w is not None]
    if not recorded or len(known) != len(watts) or not tokens:
        reason = f"power is unknown in {len(watts) - len(known)} of {len(watts)} steps"
        return {"joules": None, "joules_per_token": None, "reason": reason}
    joules = math.fsum(w * t for w, t in known)
    sources = sorted({str(s.power.source) for s in recorded})
    return {"joules": joules, "joules_per_token": joules / tokens, "sources": sources}
