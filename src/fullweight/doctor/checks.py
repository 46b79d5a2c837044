"""Checks of one machine's facts: devices, links, memory, cores, limits, ports, and what the self-tests said.

Each check is a small generator over `Facts` and the `Job`. Differences between machines are `compare.py`.
Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from fullweight.doctor.environment import value_of
from fullweight.doctor.facts import Facts, Job
from fullweight.doctor.findings import Finding, Severity
from fullweight.doctor.rules import check_environment
from fullweight.doctor.versions import check_versions

HCCL_PORTS = 32  # from HCCL_IF_BASE_PORT on
_ERROR, _WARNING, _NOTE = Severity.error, Severity.warning, Severity.note
_GB = 10**9
_SHARED_MEMORY_BYTES = _GB
_OPEN_FILES, _OPEN_FILES_CPU, _FILES_PER_RANK = 4096, 256, 16
_CORES_PER_RANK = 4
_MEMORY_SPREAD = 0.02

Check = Callable[[Facts, Job], Iterator[Finding]]


def check_machine(facts: Facts, job: Job) -> Iterator[Finding]:
    """Everything wrong with one rank's machine and environment."""
    for check in _CHECKS:
        yield from check(facts, job)


def _versions(facts: Facts, _: Job) -> Iterator[Finding]:
    yield from check_versions(facts)


def _environment(facts: Facts, job: Job) -> Iterator[Finding]:
    yield from check_environment(facts.environment, job.setting(facts))


# ---- devices --------------------------------------------------------------------------------------------------


def _count(facts: Facts, job: Job) -> Iterator[Finding]:
    devices = facts.devices
    if facts.device == "cpu":
        for kind in facts.hardware.keys() & facts.absent.keys() if facts.asked == "auto" else ():
            yield Finding(
                _WARNING if job.ranks > 1 else _NOTE,
                "devices",
                f"{facts.hardware[kind]} device file(s) of {kind}, which cannot be used: {facts.absent[kind]}",
                "a usable accelerator",
                f"the run would take the CPU; mend it (`fullweight doctor --device {kind}`), or ask for the cpu",
            )
        return
    seen = devices.count
    if seen < facts.local_size:
        why = f" ({facts.absent[facts.device]})" if facts.device in facts.absent else ""
        yield Finding(
            _ERROR,
            "devices",
            f"{seen} usable, {facts.local_size} rank(s) on this machine{why}",
            "a device for each rank",
            "start fewer ranks, or find the missing device (npu-smi info, nvidia-smi)",
        )
    elif seen > facts.local_size and facts.local_size > 1:
        idle = f"{seen} visible, {facts.local_size} ranks on this machine"
        yield Finding(_NOTE, "devices", idle, "all in use", "the others idle; start more ranks")


def _dies(facts: Facts, _: Job) -> Iterator[Finding]:
    devices, per_chip = facts.devices, facts.devices.per_chip
    if facts.device != "ascend" or not per_chip or per_chip < 2:
        return
    several = facts.local_size > 1  # one rank alone may try things on one die
    if devices.present and devices.present % per_chip:
        yield Finding(
            _ERROR if several else _NOTE,
            "dies",
            f"{devices.present} dies of chips with {per_chip} each",
            f"a multiple of {per_chip}",
            "a die is missing; look for it with `npu-smi info` and in the driver's log, and reset its chip",
        )
    halves = Counter(number // per_chip for number in devices.visible)
    lonely = sorted(chip for chip, count in halves.items() if count < per_chip)
    if lonely and not (devices.present and devices.present % per_chip):
        yield Finding(
            _WARNING if several else _NOTE,
            "dies",
            f"chip(s) {', '.join(map(str, lonely))} not whole (ASCEND_RT_VISIBLE_DEVICES)",
            "both dies of a chip in one job",
            "a twin die shares power, memory links and the spare network path; make both visible",
        )


def _chips(facts: Facts, _: Job) -> Iterator[Finding]:
    kinds = Counter(facts.devices.chips)
    if len(kinds) > 1:
        found = ", ".join(f"{n} x {name}" for name, n in kinds.most_common())
        fix = "ranks would wait for the slowest, and kernels and memory differ; make only one type visible"
        yield Finding(_ERROR, "chips", found, "one type", fix)
    memory = facts.devices.memory_bytes
    if len(kinds) == 1 and memory and min(memory) < (1 - _MEMORY_SPREAD) * max(memory):
        small = [i for i, m in enumerate(memory) if m < (1 - _MEMORY_SPREAD) * max(memory)]
        yield Finding(
            _WARNING,
            "memory",
            f"device(s) {', '.join(map(str, small))} with {min(memory) / _GB:.1f} of {max(memory) / _GB:.1f} GB",
            "the same on all",
            "pages may have been taken out after errors; see the driver's ECC report",
        )


def _links(facts: Facts, _: Job) -> Iterator[Finding]:
    links = facts.devices.links
    if links is None:
        return
    pairs = {(i, j): links[i][j] for i in range(len(links)) for j in range(i)}
    fast = {p for p, word in pairs.items() if re.match(r"NV\d|SIO|HCCS", word)}
    slow = sorted(pairs.keys() - fast)
    if fast and slow:
        told = ", ".join(f"{j}-{i} {pairs[i, j]}" for i, j in slow[:6])
        more = f" and {len(slow) - 6} more" if len(slow) > 6 else ""
        fix = "a link is down or not trained; see nvidia-smi nvlink -s, hccn_tool or npu-smi"
        yield Finding(_WARNING, "links", f"{told}{more}", "the fast link between all devices", fix)


# ---- host -----------------------------------------------------------------------------------------------------


def _files(facts: Facts, job: Job) -> Iterator[Finding]:
    least = _OPEN_FILES if facts.device != "cpu" else _OPEN_FILES_CPU
    needed, limit = max(least, _FILES_PER_RANK * job.ranks), facts.host.open_files
    if limit < needed:
        raising = f"ulimit -n {needed}"
        if facts.host.open_files_hard < needed:
            raising += " (and the hard limit, in limits.conf)"
        fix = f"sockets between ranks and data files count; {raising}"
        yield Finding(_WARNING, "open-files", str(limit), f"at least {needed}", fix)


def _cores(facts: Facts, _: Job) -> Iterator[Finding]:
    cores, ranks = facts.host.cores, facts.local_size
    wanted = _CORES_PER_RANK * ranks if facts.device != "cpu" else ranks
    if cores < wanted:
        yield Finding(
            _WARNING if facts.device != "cpu" else _NOTE,
            "cores",
            f"{cores} for {ranks} rank(s)",
            f"at least {wanted}",
            "ranks wait for each other's launches; widen the container's or taskset's cores",
        )
    threads = facts.environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and ranks > 1 and int(threads) * ranks > cores:
        found = f"{threads} threads for each of {ranks} ranks on {cores} cores"
        lower = str(max(1, cores // ranks))
        yield Finding(_NOTE, "OMP_NUM_THREADS", found, lower, "host work slows down", {"OMP_NUM_THREADS": lower})


def _space(facts: Facts, job: Job) -> Iterator[Finding]:
    shared = facts.host.shared_memory_free_bytes
    if shared is not None and shared < _SHARED_MEMORY_BYTES and facts.device != "cpu":
        yield Finding(
            _WARNING,
            "shared-memory",
            f"{shared / _GB:.2f} GB free in /dev/shm",
            "at least 1 GB",
            "collectives inside a machine use it; give the container more (its shm-size), or the host's",
        )
    free, needed = facts.host.run_folder_free_bytes, job.needed_disk_bytes
    if needed is not None and free < needed:
        yield Finding(
            _ERROR,
            "disk",
            f"{free / _GB:,.1f} GB free at {facts.host.run_folder}",
            f"{needed / _GB:,.1f} GB for the recipe's checkpoints and export",
            "free some, choose another folder, or lower checkpoint.keep",
        )


def _ports(facts: Facts, job: Job) -> Iterator[Finding]:
    if facts.device != "ascend" or job.ranks == 1:
        return
    first = int(value_of("HCCL_IF_BASE_PORT", facts.environment)) if _base_port_legal(facts) else 60000
    last = first + HCCL_PORTS - 1
    taken = [p for p in facts.host.ports_in_use if first <= p <= last]
    if taken:
        yield Finding(
            _ERROR,
            "HCCL_IF_BASE_PORT",
            f"port(s) {', '.join(map(str, taken))} in use",
            f"{first}-{last} free",
            "another process holds them; end it, or set HCCL_IF_BASE_PORT to 32 free ports, on every machine",
        )
    if not _covered(facts.host.reserved_ports, first, last) and _covers(facts.host.automatic_ports, first):
        yield Finding(
            _NOTE,
            "HCCL_IF_BASE_PORT",
            f"{first}-{last} may be given to any process",
            "reserved",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}",
        )


def _base_port_legal(facts: Facts) -> bool:
    return value_of("HCCL_IF_BASE_PORT", facts.environment).isdigit()


def _covered(reserved: str, first: int, last: int) -> bool:
    for part in filter(None, reserved.strip().split(",")):
        low, _, high = part.partition("-")
        if int(low) <= first and last <= int(high or low):
            return True
    return False


def _covers(automatic: str, port: int) -> bool:
    bounds = automatic.split()
    return len(bounds) == 2 and int(bounds[0]) <= port <= int(bounds[1])


def _interfaces(facts: Facts, job: Job) -> Iterator[Finding]:
    """A named network interface must be there: else ranks wait for each other until they give up."""
    names = {"ascend": "HCCL_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME"}
    for name in filter(None, (names.get(facts.device), "GLOO_SOCKET_IFNAME")):
        value = facts.environment.get(name, "")
        if job.ranks == 1 or not value or value.startswith("^") or not facts.host.interfaces:
            continue
        exact = value.startswith("=") or name == "GLOO_SOCKET_IFNAME"
        wanted = [part.lstrip("=") for part in value.split(",")]
        here = facts.host.interfaces
        if not any(i == w if exact else i.startswith(w.split(":")[0]) for w in wanted for i in here):
            yield Finding(
                _ERROR,
                name,
                repr(value),
                f"one of {', '.join(here)}",
                "no such interface; correct it, or unset it",
            )


# ---- self-tests -----------------------------------------------------------------------------------------------


def _operations(facts: Facts, _: Job) -> Iterator[Finding]:
    for result in facts.operations:
        worst = max(result.error or 0.0, result.gradient_error or 0.0)
        bad = result.failure or (f"relative error {worst:.1e}" if not worst <= result.tolerance else None)
        if bad is not None:
            yield Finding(
                _ERROR,
                f"operation {result.operation} ({result.dtype})",
                bad,
                f"at most {result.tolerance:.0e} beside the reference on the CPU",
                "do not train with it: choose another set of operations, or change the driver or the chip",
            )


def check_collectives(job: Job) -> Iterator[Finding]:
    """Wrong or failed collectives; how fast they are is told, and judged by nobody."""
    for result in job.collectives:
        if not result.correct:
            yield Finding(
                _ERROR,
                f"collective {result.collective} ({result.device})",
                result.failure or "wrong values",
                "the right ones on every rank",
                "do not train over this network; see the vendor's log of the ranks",
            )


_CHECKS: tuple[Check, ...] = (
    _versions,
    _environment,
    _count,
    _dies,
    _chips,
    _links,
    _files,
    _cores,
    _space,
    _ports,
    _interfaces,
    _operations,
)
