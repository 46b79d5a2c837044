"""Differences between the ranks of a job that must not be: versions, chips, variables, clocks.

What most ranks have is taken for right, and those that differ are named by machine and rank. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from fullweight.doctor.checks import check_collectives, check_machine
from fullweight.doctor.environment import shared, variables
from fullweight.doctor.facts import Facts, Job
from fullweight.doctor.findings import Finding, Severity, by_weight

CLOCK_SECONDS = 10.0
_ERROR, _WARNING = Severity.error, Severity.warning
_SHOWN = 4
_UNSET = "unset"


def check_job(job: Job) -> list[Finding]:
    """Everything wrong with a job, gravest first; what several ranks share is said once."""
    merged: dict[tuple[object, ...], tuple[Finding, list[Facts]]] = {}
    for facts in job.machines:
        for finding in check_machine(facts, job):
            key = (finding.severity, finding.name, finding.found, finding.expected)
            merged.setdefault(key, (finding, []))[1].append(facts)
    found = [_placed(finding, ranks, job) for finding, ranks in merged.values()]
    return by_weight([*found, *check_collectives(job), *differences(job)])


def differences(job: Job) -> Iterator[Finding]:
    """Findings on what differs between ranks."""
    machines = job.machines
    if len(machines) < 2:
        return
    for name, value, severity, fix in _COMPARED:
        yield from _differing(name, [value(f) for f in machines], machines, severity, fix)
    names = sorted({n for f in machines for n in shared(f.environment, f.device)})
    for name in names:
        of_vendor = name not in variables() or variables()[name].device != "any"
        fix = "export the same on every machine (device.env of the recipe does that)"
        values = [f.environment.get(name, _UNSET) for f in machines]
        yield from _differing(name, values, machines, _ERROR if of_vendor else _WARNING, fix)
    yield from _clocks(machines)


def _differing(
    name: str, values: Sequence[str], machines: Sequence[Facts], severity: Severity, fix: str
) -> Iterator[Finding]:
    usual, _ = Counter(values).most_common(1)[0]
    others: dict[str, list[Facts]] = {}
    for value, facts in zip(values, machines, strict=True):
        if value != usual:
            others.setdefault(value, []).append(facts)
    for value, ranks in others.items():
        yield Finding(severity, name, value, f"{usual}, as on most ranks", fix, where=_where(ranks))


def _clocks(machines: Sequence[Facts]) -> Iterator[Finding]:
    for facts in machines:
        offset, doubt = facts.clock_offset_seconds, facts.clock_uncertainty_seconds or 0.0
        if offset is not None and abs(offset) - doubt > CLOCK_SECONDS:
            yield Finding(
                _WARNING,
                "clock",
                f"{offset:+.1f} s from rank 0 (to within {doubt:.1f} s)",
                f"within {CLOCK_SECONDS:.0f} s",
                "logs of a failure cannot be put in order; start a time service (chrony, ntp)",
                where=_where([facts]),
            )


def _placed(finding: Finding, ranks: Sequence[Facts], job: Job) -> Finding:
    if finding.where or len(ranks) == len(job.machines):
        return finding
    return Finding(**{**finding.__dict__, "where": _where(ranks)})


def _where(ranks: Sequence[Facts]) -> str:
    told = [f"rank {f.rank} on {f.host_name}" for f in ranks[:_SHOWN]]
    return ", ".join(told) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _chip(facts: Facts) -> str:
    return facts.devices.chips[0] if facts.devices.chips else facts.device


def _memory(facts: Facts) -> str:
    sizes = facts.devices.memory_bytes
    return f"{min(sizes) / 1e9:.0f} GB" if sizes and facts.device != "cpu" else _UNSET


_VERSION = "install the same on every machine"
_COMPARED: tuple[tuple[str, Callable[[Facts], str], Severity, str], ...] = (
    ("device", lambda f: f.device, _ERROR, "give every machine the same accelerator, or set train.device"),
    ("chips", _chip, _ERROR, "ranks would wait for the slowest, and results differ; use one type of chip"),
    ("devices", lambda f: str(f.devices.count), _WARNING, "a machine has lost a device, or hides it"),
    ("memory", _memory, _WARNING, "pages may have been taken out after errors; see the driver's ECC report"),
    ("operations", lambda f: f.operations_set or _UNSET, _ERROR, "results would differ by rank; set ops.default"),
    ("python", lambda f: f.versions.python, _WARNING, _VERSION),
    ("torch", lambda f: f.versions.torch, _ERROR, _VERSION),
    ("torch_npu", lambda f: f.versions.npu_torch or "none", _ERROR, _VERSION),
    ("cann", lambda f: f.versions.cann or "none", _ERROR, _VERSION),
    ("nccl", lambda f: f.versions.nccl_library or "none", _ERROR, _VERSION),
    ("driver", lambda f: f.versions.driver or "none", _WARNING, _VERSION),
)
