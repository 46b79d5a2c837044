"""Taking recorded steps again, from a kept state or from the beginning, where nothing of the run is touched.

What decides the numbers comes from the record: the configuration in force at each step, the architecture, the
number of threads, and, where as many ranks are at work, their layout. What does not is left out: evaluation,
trackers, export, caches. On another number of ranks the layout is the plain one of that many.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fullweight.audit import stack
from fullweight.audit.recorded import Recorded, Segment
from fullweight.audit.windows import Window
from fullweight.checkpoint import store
from fullweight.checkpoint.hashing import digest
from fullweight.checkpoint.manifest import Facts, Generation, verify
from fullweight.checkpoint.peers import Peers
from fullweight.core.errors import CheckpointError, DataError
from fullweight.parallel.config import ParallelConfig
from fullweight.parallel.mesh import Ranks
from fullweight.train.assemble import Run, assemble
from fullweight.train.config import RunConfig
from fullweight.train.loop import one_step
from fullweight.train.run_folder import RunFolder, write_json
from fullweight.train.saving import facts

_AXES = (
    *("pipeline", "schedule", "virtual_stages", "stage_layers", "reshard_after"),
    *("replicate", "shard", "context", "tensor", "expert"),
)

_MOST_THREADS = 4096  # a stranger's number is not obeyed whatever it is


@dataclass(frozen=True)
class Means:
    """With what a replay works where it does not follow the record."""

    data: Path | None = None  # folder in which data files are looked for by their names
    device: str | None = None
    threads: int | None = None
    scratch: Path | None = None  # where the temporary folder is made
    nudge: int = 0  # which of the last bits of every weight are turned before the first step


@dataclass(frozen=True)
class Again:
    """What came of the same steps: a record of each, and the states before and after."""

    records: tuple[dict[str, Any], ...]
    start: Generation
    end: Generation
    stack: tuple[str, ...]  # why bits may differ from the recorded ones


def repeat(
    recorded: Recorded, window: Window, start: Generation | None, ranks: Ranks, folder: Path, means: Means
) -> Again:
    """Take the window's steps from `start` (None: the beginning), writing into `folder` alone; all ranks together.

    Raises DataError when the data are not those of the run, and what `assemble` and `TrainState.restore` raise.
    """
    Peers().on_main(lambda: _require_files(recorded, means.data))
    records: list[dict[str, Any]] = []
    reasons: list[str] = []
    now, begun = start, start
    for segment in recorded.segments(window, None if start is None else start.manifest.facts):
        environment, code = recorded.stood_on(segment.first - 1)
        with threads(means.threads or environment.get("threads_per_rank")):
            run = _assembled(recorded, segment, now, ranks, folder, means)
            try:
                if now is None:
                    begun = _saved(run, folder)
                else:
                    run.state.restore(now)
                if not records and means.nudge:
                    _turn_bits(run, means.nudge)
                line, world = recorded.steps.get(segment.last, {}), recorded.world_at(segment.last)
                reasons += stack.differences(environment, code, world, line.get("operations"), run)
                records += [one_step(run) for _ in segment.steps]
                now = _saved(run, folder)
            finally:
                run.state.loader.close()
                run.power.close()
    assert now is not None, "a window has a step"
    assert begun is not None
    return Again(tuple(records), begun, now, tuple(dict.fromkeys(reasons)))


@contextmanager
def recorded_run(recorded: Recorded, step: int, ranks: Ranks, folder: Path, means: Means) -> Iterator[Run]:
    """A run at a kept state; all ranks together.

    Raises CheckpointError when no such state is kept, or it is not the run's, and what `repeat` raises.
    """
    path = recorded.kept().get(step)
    if path is None:
        kept = ", ".join(str(step) for step in sorted(recorded.kept())) or "none"
        raise CheckpointError(f"no state of step {step} is kept; kept: {kept}")
    generation = verify(path, Peers())
    if reason := recorded.why_not_its(generation):
        raise CheckpointError(reason)
    segment = recorded.segments(Window(step, step + 1), generation.manifest.facts)[-1]
    with threads(means.threads or recorded.stood_on(step)[0].get("threads_per_rank")):
        run = _assembled(recorded, segment, generation, ranks, folder, means)
        try:
            run.state.restore(generation)
            yield run
        finally:
            run.state.loader.close()
            run.power.close()


def config_at(
    recorded: Recorded, segment: Segment, start: Facts | None, ranks: Ranks, folder: Path, means: Means
) -> RunConfig:
    """The configuration of a segment's steps as it is run here; all ranks together.

    The architecture is written into `folder`: that is where a configuration without a checkpoint has it from.
    """
    if start is not None and ranks.is_main:
        write_json(folder / "model.json", start.model)
    ranks.barrier()
    values = replay_values(recorded, segment, start, ranks.size, folder, means)
    return RunConfig.resolve(values, f"the configuration of step {segment.first}")


def replay_values(
    recorded: Recorded, segment: Segment, start: Facts | None, num_ranks: int, folder: Path, means: Means
) -> dict[str, Any]:
    """The same as values, for `RunConfig.resolve`."""
    values = copy.deepcopy(segment.config)
    for section in ("data", "eval", "optimizer", "parallel", "train"):
        if not isinstance(values.get(section), dict):
            raise CheckpointError(
                f"the configuration of step {segment.first} has no section {section}; it is damaged"
            )
    for section in ("trackers", "export", "boundaries"):
        values.pop(section, None)
    values |= {"output": str(folder / "run"), "export": {"enabled": False}}
    values["eval"] = {**values["eval"], "num_samples": 0}
    values["data"] = {**values["data"], "cache_folder": None}
    if means.data is not None:
        for kind in ("sources", "held_out"):
            values["data"][kind] = [_moved(source, means.data) for source in values["data"].get(kind) or ()]
    line = recorded.steps.get(segment.first, {})
    values["train"] = {
        **values["train"],
        # what a percentage would mean; a replay times nothing, and need not measure it
        "peak_flops_per_second": line.get("peak", {}).get("flops_per_second") or 1.0,
        "device": means.device or values["train"]["device"],
    }
    if start is not None:
        values["model"] = {"config": str(folder / "model.json")}
    if num_ranks != recorded.world_at(segment.last).get("ranks"):
        default = ParallelConfig()
        values["parallel"] = {**values["parallel"], **{name: getattr(default, name) for name in _AXES}}
    return values


def _turn_bits(run: Run, bits: int) -> None:
    """Move every fp32 weight by as much as a rounding does, whatever ranks hold it: by its own last bits."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.dtype is torch.float32:
                local.detach().view(torch.int32).bitwise_xor_(bits)


def _assembled(
    recorded: Recorded, segment: Segment, now: Generation | None, ranks: Ranks, folder: Path, means: Means
) -> Run:
    start = None if now is None else now.manifest.facts
    config = config_at(recorded, segment, start, ranks, folder, means)
    tokenizer = None if start is None else recorded.tokenizer
    run = assemble(config, RunFolder(folder / "run"), ranks, tokenizer)
    wanted, found = recorded.manifest.data.identity, run.state.loader.state_dict()["data"]
    if wanted != found:
        run.state.loader.close()
        run.power.close()
        raise DataError(
            f"the data are not those of the run: their identity is {found}, the recorded one is {wanted}. Give "
            "the files that the run read at their recorded paths, or their folder with --data"
        )
    return run


def _saved(run: Run, folder: Path) -> Generation:
    return verify(store.save(folder / "states", run.state.tensors(), facts(run, None)).path, Peers())


def _require_files(recorded: Recorded, folder: Path | None) -> None:
    """Raise DataError on a data file that is not what the run read. Absent ones are for the reader to tell."""
    for known in recorded.manifest.data.files:
        path = Path(known.name) if folder is None else folder / Path(known.name).name
        if path.is_file() and (found := digest(path)).sha256 != known.sha256:
            raise DataError(
                f"{path} is not what the run read: it has {found.size_bytes:,} bytes with SHA-256 {found.sha256}, "
                f"the manifest says {known.size_bytes:,} with {known.sha256}; give the run's files with --data"
            )


def _moved(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    if source.get("kind") != "file":
        return source
    path = folder / Path(source["path"]).name
    if not path.exists():
        raise DataError(f"no {path.name} in {folder}; the run read {source['path']}")
    return {**source, "path": str(path)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads inside the block; None: as many as there are. Raises CheckpointError on no such number."""
    if count is not None and (not isinstance(count, int) or not 0 < count <= _MOST_THREADS):
        raise CheckpointError(f"{str(count)[:40]} threads of a rank are recorded, which cannot be")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
