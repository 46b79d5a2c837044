"""What saving and loading a state costs: time of each part, stall of training, and training's speed meanwhile.

The state is random fp32 in tensors of 8 MB. Beside our save stand the same bytes written plainly and synced (what
the disk gives), and torch.distributed.checkpoint alone, without digests and without reading back. Each repeat runs
all operations in turn, so that whatever else the machine does falls on all alike; figures are medians.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fullweight.bench.measure import Waiting
from fullweight.checkpoint import store
from fullweight.checkpoint.async_save import SaveConfig, Saver
from fullweight.checkpoint.manifest import Facts, verify
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.snapshot import Snapshot

_TENSOR_BYTES = 8_000_000
_MATMUL = 512


@dataclass(frozen=True)
class Timing:
    """One operation over the whole state."""

    operation: str
    seconds: float
    bytes_per_second: float
    spread: float  # (slowest - fastest) / median


@dataclass(frozen=True)
class CheckpointBench:
    """One benchmark: timings, what training notices, and whether other work disturbed it."""

    size_bytes: int
    threads: int
    timings: list[Timing]
    stall_seconds: float  # of the training thread, for a save in the background
    training_speed_meanwhile: float  # matmul rate while a save is written, over the rate alone
    seconds_meanwhile: float  # that such a save takes, at low priority beside matmuls that never pause
    waited_share: float | None

    def seconds(self, operation: str) -> float:
        """Median of one operation."""
        return next(t.seconds for t in self.timings if t.operation == operation)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_checkpoint(folder: Path, megabytes: int = 512, repeats: int = 5, seed: int = 0) -> CheckpointBench:
    """Time all operations on a state of that size in a new folder under `folder`, which is removed again."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, megabytes * 1_000_000 // _TENSOR_BYTES)
    state = {f"model.{i}": torch.randn(_TENSOR_BYTES // 4, generator=generator) for i in range(count)}
    size, waiting = store.local_bytes(state), Waiting()
    seconds: dict[str, list[float]] = {}
    beside: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-checkpoint-") as name:
        for repeat in range(repeats + 1):
            for operation, elapsed in _once(Path(name), state).items():
                if repeat:  # the first touches pages and imports
                    seconds.setdefault(operation, []).append(elapsed)
            noticed = _beside_training(Path(name), state)
            if repeat:
                beside.append(noticed)
    timings = [
        Timing(operation, median := statistics.median(times), size / median, (max(times) - min(times)) / median)
        for operation, times in seconds.items()
    ]
    stall, speed, meanwhile = (statistics.median(values) for values in zip(*beside, strict=True))
    return CheckpointBench(size, Peers().num_threads, timings, stall, speed, meanwhile, waiting.share())


def _once(folder: Path, state: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of each operation, everything written removed again."""
    plain, library, ours = folder / "plain", folder / "library", folder / "ours"
    target = {name: torch.ones_like(tensor) for name, tensor in state.items()}  # pages touched, as a model's are
    copies = Snapshot()
    copies.take(state)
    found: dict[str, float] = {}

    def timed(operation: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        found[operation] = time.perf_counter() - began

    timed("SHA-256, one thread", lambda: _hash(state))
    timed("write and sync", lambda: _write(plain, state))
    timed(
        "torch.distributed.checkpoint save",
        lambda: dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(library), no_dist=True),
    )
    timed("save: hashed, read back", lambda: store.save(ours, state, _facts()))
    timed("snapshot", lambda: copies.take(state))
    path = ours / "step-1"
    timed("verify", lambda: verify(path))
    timed(
        "torch.distributed.checkpoint load",
        lambda: dcp.load(dict(target), storage_reader=dcp.FileSystemReader(library), no_dist=True),
    )
    generation = verify(path)
    timed("load", lambda: store.load(generation, target))
    for made in (library, ours):
        shutil.rmtree(made)
    plain.unlink()
    return found


def _beside_training(folder: Path, state: dict[str, Tensor]) -> tuple[float, float, float]:
    """(stall of a background save, speed of matmuls while it is written over their speed alone, its seconds)."""
    saver = Saver(folder / "beside", SaveConfig())
    saver.save(state, _facts())
    saver.wait()
    alone = _matmuls(lambda done: done < 0.5)
    stall = saver.save(state, _facts())
    thread = saver._thread
    assert thread is not None
    began = time.perf_counter()
    meanwhile = _matmuls(lambda done: thread.is_alive())
    seconds = time.perf_counter() - began
    saver.wait()
    shutil.rmtree(folder / "beside")
    return stall.seconds, meanwhile / alone, seconds


def _matmuls(go_on: Callable[[float], bool]) -> float:
    """Products a second, for as long as `go_on(seconds so far)`."""
    x, count, began = torch.ones(_MATMUL, _MATMUL), 0, time.perf_counter()
    while go_on(time.perf_counter() - began):
        torch.mm(x, x)
        count += 1
    return count / (time.perf_counter() - began)


def _hash(state: dict[str, Tensor]) -> str:
    hasher = sha256()
    for tensor in state.values():
        hasher.update(memoryview(tensor.numpy()))  # type: ignore[arg-type]
    return hasher.hexdigest()


def _write(path: Path, state: dict[str, Tensor]) -> None:
    with path.open("wb") as stream:
        for tensor in state.values():
            stream.write(memoryview(tensor.numpy()))  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())


def _facts() -> Facts:
    return Facts(
        step=1, model={}, config={}, world={"ranks": 1}, position={}, versions={"torch": torch.__version__}
    )
