"""What each part of a predicted step rests on, and how wide that makes its interval.

A part is fitted on runs that show it: published ones in which it is at least `_SHOWN` of the step. Coefficients
are global, so a part may be fitted on GPUs alone and still be asked of an Ascend die. Where fewer than `_ENOUGH`
runs on chips of the same make show it, the basis is thin; where none does, or the link it goes over has an assumed
bandwidth, it is UNKNOWN: the value is a guess by analogy, marked as such, and its interval is a factor of two to
each side. A step's interval is that of published routed runs that the fit had not seen, wider by these factors,
and by an expert load that nobody measured. The factors are assumptions. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache

from fullweight.planner.coefficients import calibration
from fullweight.planner.cost import StepTime, parts_of, step_time
from fullweight.planner.job import Job
from fullweight.planner.published import load
from fullweight.planner.topology import near_ranks, placements

_SHOWN, _ENOUGH = 0.02, 3
_FACTORS = {"fitted": (1.0, 1.0), "thin": (0.8, 1.25), "UNKNOWN": (0.5, 2.0)}
_LOAD = 1.5
"""Load of the fullest expert rank over the mean that an unmeasured load is taken to stay below."""
_AXES = {name: name for name in ("tensor", "context", "expert", "data", "pipeline")}


@dataclass(frozen=True)
class Term:
    """One part of a step: its seconds, between what, and why so."""

    name: str
    seconds: float
    low: float
    high: float
    status: str  # fitted, thin, UNKNOWN or counted
    basis: str


def terms(job: Job, time: StepTime) -> list[Term]:
    """Every part of the step that takes time, in the order of `StepTime`, and the load of the experts."""
    found = []
    here, everywhere = _shown(job.chip.maker), _shown(None)
    for name, seconds in asdict(time).items():
        if seconds <= 0:
            continue
        status, basis = _basis(job, name, here[name], everywhere[name])
        low, high = _FACTORS.get(status, (1.0, 1.0))
        found.append(Term(name, seconds, seconds * low, seconds * high, status, basis))
    if job.expert > 1 and job.expert_skew == 1.0:
        capped = "" if job.expert_capacity is None else ", or what the experts' capacity lets through"
        uneven = (
            step_time(parts_of(replace(job, expert_skew=_LOAD)), calibration().coefficients).total - time.total
        )
        basis = f"no measurement given (--skew): taken as even, up to {_LOAD:g} times the mean at worst{capped}"
        found.append(Term("expert load", 0.0, 0.0, max(uneven, 0.0), "UNKNOWN", basis))
    return found


def interval(job: Job, time: StepTime) -> tuple[float, float]:
    """Seconds between which the step is expected: published runs' spread times the terms' own."""
    low, high = calibration().moe_spread
    found = terms(job, time)
    return low * sum(t.low for t in found), high * sum(t.high for t in found)


def _basis(job: Job, name: str, here: int, everywhere: int) -> tuple[str, str]:
    """(status, in words)."""
    where = f"{here} on {job.chip.maker}"
    if name == "bubble":
        if job.overlapped_bubble:
            return (
                "UNKNOWN",
                "half of (p - 1) / (v m), as zero-bubble schedules promise: no published run of one here",
            )
        return "counted", "(p - 1) / (v m) of the work"
    if name in ("newton_schulz", "pieces"):
        how = "at the rate of other matrix products" if name == "newton_schulz" else "at the links' bandwidth"
        return "UNKNOWN", f"counted ({how}, nothing beside it): no published run says what Muon takes"
    if name == "host":
        return "UNKNOWN", "bytes of the moments over 25e9 bytes/s to the host: an assumption, no published run"
    if assumed := _assumed_link(job, name):
        return "UNKNOWN", f"{assumed}; share that is not hidden from {everywhere} published runs, {where}"
    status = "fitted" if here >= _ENOUGH else "thin" if here else "UNKNOWN"
    return status, f"{everywhere} published runs show it, {where}"


def _assumed_link(job: Job, name: str) -> str:
    """The links of an axis, if their bandwidth is an assumption."""
    if name not in _AXES:
        return ""
    for placement in placements(job):
        if placement.axis == _AXES[name]:
            link = placement.link
            if name == "expert":
                link = job.chip.link(near_ranks(job.chip, job.expert))
            place = job.chip.provenance.get(f"links.{job.chip.links.index(link)}.bandwidth")
            if place is not None and place.source.startswith("assumption"):
                return f"{link.name} links' bandwidth is an assumption"
    return ""


@cache
def _shown(maker: str | None) -> Counter[str]:
    """How many published runs, on that maker's chips or on any, show each part."""
    found: Counter[str] = Counter()
    for case in load()[0]:
        if maker in {None, case.job.chip.maker}:
            time = step_time(parts_of(case.job), calibration().coefficients)
            found.update(name for name, seconds in asdict(time).items() if seconds >= _SHOWN * time.total)
    found["optimizer"] = found["memory_bound"]  # the same coefficient, of the same kind of traffic
    return found
