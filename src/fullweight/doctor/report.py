"""What was found, for people: machines, operations, collectives, findings, and one line of verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fullweight.doctor.facts import Facts, Job
from fullweight.doctor.findings import Finding, Severity, blocking

_COLOURS = {Severity.error: "bold red", Severity.warning: "yellow", Severity.note: "cyan"}
_GB = 10**9


def show(job: Job, findings: Sequence[Finding], console: Console) -> None:
    """Print everything that a person looks at."""
    for line in _machines(job):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if job.machines[0].operations:
        console.print(_operations(job))
    if job.collectives:
        console.print(_collectives(job))
    for finding in findings:
        place = f" ({finding.where})" if finding.where else ""
        accepted = " (accepted)" if finding.name in job.accept and finding.severity is Severity.warning else ""
        head = Text(f"{finding.severity}{accepted} ", style=_COLOURS[finding.severity])
        head.append(f"{finding.name}{place}", style="bold")
        console.print(head)
        console.print(f"    found {finding.found}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"    expected {finding.expected}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"    {finding.fix}", markup=False, highlight=False, soft_wrap=True)
    console.print(verdict(job, findings), style="bold", highlight=False)


def verdict(job: Job, findings: Sequence[Finding]) -> str:
    """One line: whether a run would start, and how many findings there are."""
    counts = {s: sum(f.severity is s for f in findings) for s in Severity}
    told = ", ".join(f"{n} {s}{'s' if n != 1 else ''}" for s, n in counts.items() if n)
    if counts[Severity.error]:
        return f"not ready: {told}"
    if blocking(findings, job.accept):
        return f"unwise: {told}; a run starts only with device.accept, or when they are mended"
    return f"ready: {told or 'nothing found'}"


def _machines(job: Job) -> Iterator[str]:
    """A line or two for each machine."""
    hosts: dict[str, list[Facts]] = {}
    for facts in job.machines:
        hosts.setdefault(facts.host_name, []).append(facts)
    for host, ranks in hosts.items():
        first, last = ranks[0], ranks[-1]
        chips = ", ".join(sorted({chip for f in ranks for chip in f.devices.chips})) or "no chip"
        sizes = sorted({round(m / _GB) for f in ranks for m in f.devices.memory_bytes})
        memory = f", {'-'.join(str(s) for s in (sizes[0], sizes[-1])[: len(sizes)])} GB each" if sizes else ""
        who = f"rank {first.rank}" if first is last else f"ranks {first.rank}-{last.rank}"
        yield f"{host}, {who}: {first.devices.count} {first.device} ({chips}{memory}); {_software(first)}"
        disk = first.host.run_folder_free_bytes / _GB
        yield (
            f"  {first.host.cores} cores, {first.host.open_files} open files, {disk:,.0f} GB free for "
            f"{first.host.run_folder}{_clocks(ranks)}"
        )
        for name, value in first.applied.items():
            yield f"  set by the recipe: {name}={value}"


def _clocks(ranks: Sequence[Facts]) -> str:
    offsets = [abs(f.clock_offset_seconds) for f in ranks if f.clock_offset_seconds is not None and f.rank]
    return f", clock within {max(offsets):.3f} s of rank 0's" if offsets else ""


def _software(facts: Facts) -> str:
    found = facts.versions
    named = {"torch_npu": found.npu_torch, "CANN": found.cann, "NCCL": found.nccl_library, "driver": found.driver}
    told = {"Python": found.python, "torch": found.torch, **named}
    return ", ".join(f"{name} {version}" for name, version in told.items() if version)


def _operations(job: Job) -> Table:
    """Each operation's worst error over ranks; what is within its tolerance on all is one line short."""
    sets = sorted({f.operations_set for f in job.machines})
    table = Table(
        title=f"operations ({', '.join(sets)}) beside the reference in float64 on the CPU: relative error"
    )
    for title in ("operation", "fp32", "gradients", "bf16", "gradients"):
        table.add_column(title, justify="left" if title == "operation" else "right")
    rows: dict[str, dict[str, list[float]]] = {}
    failed: set[str] = set()
    for result in (r for f in job.machines for r in f.operations):
        cells = rows.setdefault(result.operation, {})
        if result.failure:
            failed.add(result.operation)
        for kind, value in (("", result.error), ("'", result.gradient_error)):
            if value is not None:
                cells.setdefault(result.dtype + kind, []).append(value)
    for operation, cells in rows.items():
        told = [f"{max(cells[k]):.1e}" if k in cells else "-" for k in ("fp32", "fp32'", "bf16", "bf16'")]
        table.add_row(operation, *told, style="bold red" if operation in failed else None)
    return table


def _collectives(job: Job) -> Table:
    table = Table(title=f"collectives of {job.ranks} ranks")
    for title in ("collective", "device", "message MB", "right", "bus GB/s"):
        table.add_column(title, justify="right" if title in ("message MB", "bus GB/s") else "left")
    for result in job.collectives:
        speed = result.gigabytes_per_second
        table.add_row(
            result.collective,
            result.device,
            f"{result.message_bytes / 1e6:.1f}",
            "yes" if result.correct else "[bold red]no[/]",
            f"{speed:.2f}" if speed is not None else "-",
        )
    return table
