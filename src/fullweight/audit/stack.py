"""Whether this process stands on what a run stood on, so that the same steps must give the same bits.

Measured: on the CPU one configuration gives equal weights in every process, and another number of threads gives
others from the first step on. So do another version of torch, another processor (its vector width chooses the
kernels), another device, other operations, another layout of ranks.
"""

from __future__ import annotations

from typing import Any

from fullweight.checkpoint.compare import changes
from fullweight.train import code
from fullweight.train.assemble import Run
from fullweight.train.run_folder import environment

_COMPARED = (
    "packages.torch",
    "machine.processor",
    "device.name",
    "device.chip",
    "threads_per_rank",
)


def differences(
    recorded: dict[str, Any],
    recorded_code: dict[str, Any],
    world: dict[str, Any],
    operations: str | None,
    run: Run,
) -> list[str]:
    """Why bits may differ from what was recorded: empty where they must not.

    `recorded` and `recorded_code` are the run's environment and code, `world` its ranks and axes, `operations` the
    name in the ledger's line.
    """
    now = environment(run.ranks.size, run.ranks.device)
    found = changes(recorded, now)
    reasons = [_told(name, *found[name]) for name in _COMPARED if name in found]
    if recorded_code.get("source_sha256") != (source := code.identity()["source_sha256"]):
        reasons.append(_told("code", recorded_code.get("source_sha256"), source))
    if world != (here := {"ranks": run.ranks.size, "axes": run.ranks.layout.axes()}):
        reasons.append(_told("layout", world, here))
    if operations is not None and operations != run.model.ops.name:
        reasons.append(_told("operations", operations, run.model.ops.name))
    if run.ranks.device.type != "cpu" and not (recorded.get("deterministic") and now["deterministic"]):
        reasons.append("operations of this device do not repeat bit for bit unless parallel.deterministic is set")
    return reasons


def _told(what: str, recorded: Any, here: Any) -> str:
    return f"{what}: {recorded} when recorded, {here} here"
