"""What a benchmark run is told and what it reports, process memory, and the machine's matmul peak.

Peak memory is the kernel's high-water mark of this process image (VmHWM). getrusage's ru_maxrss is only the
fallback: on Linux it also remembers the parent's memory from before exec, so that a small child of a large
parent would report the parent. The baseline is what is resident once everything is imported, before any
model exists.

Times are wall times, so other work on the machine spoils them. How much is on record: the share of the timed
steps during which the main thread was ready to run but waited for a processor (Linux only).
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from fullweight.core.config import Config
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.train.peak import matmul_rates


class BenchConfig(Config):
    """What to measure; the same object reaches every subprocess."""

    preset: str = "bench"
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field((1024, 4096, 16384, 32768), min_length=1)
    documents: PositiveInt = Field(1, description="documents that the row is split into, as even as possible")
    optimizer: Literal["adamw", "muon"] = "adamw"
    transformers_up_to: NonNegativeInt = Field(4096, description="longest row run in transformers; 0: none")
    transformers_experts: Literal["eager", "grouped_mm", "batched_mm"] = "eager"
    rounds: PositiveInt = Field(1, description="passes over all lengths, each in fresh processes")
    repeats: PositiveInt = Field(3, description="fewest timed steps of a process")
    warm_up: NonNegativeInt = Field(1, description="fewest steps before them")
    seconds: NonNegativeFloat = Field(10.0, description="least time for timed steps; half of it for warm-up")
    seed: NonNegativeInt = 0
    threads: PositiveInt = 1

    def architecture(self) -> DeepSeekV4Config:
        return DeepSeekV4Config.preset(self.preset)

    def document_lengths(self, length: int) -> list[int]:
        """`length` tokens split over the documents, longer ones first."""
        documents = min(self.documents, length)
        return [length // documents + (i < length % documents) for i in range(documents)]

    def tokens(self, length: int) -> torch.Tensor:
        """[length] int64 uniform token ids from the seed, the same for every implementation."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.architecture().vocab_size, (length,), generator=generator)


@dataclass(frozen=True)
class Measurement:
    """Timed steps of one subprocess; `steps` holds seconds by phase, warm-up left out."""

    steps: list[dict[str, float]]
    baseline_bytes: int
    peak_bytes: int
    waited_share: float | None  # of the timed steps, for a processor; None where the system does not say
    losses: dict[str, float] = field(default_factory=dict)  # of the last step, to show that it ran
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MatmulPeak:
    """Median FLOP/s of a bf16 product by shape "rows x in x out"."""

    flops_per_second: dict[str, float]
    spread: dict[str, float]  # (slowest - fastest) / median time
    waited_share: float | None


def timed_steps(
    config: BenchConfig, step: Callable[[], dict[str, float]]
) -> tuple[list[dict[str, float]], Waiting]:
    """Warm up, then time: `step` returns its seconds by phase. Also says how long the timed part waited.

    Both go on until there were enough steps and enough time: a short step needs many repeats for its median, and
    its products meet new shapes, which have to be prepared, for its first few seconds.
    """
    for _ in _enough(config.warm_up, config.seconds / 2 if config.warm_up else 0.0):
        step()
    waiting = Waiting()
    return [step() for _ in _enough(config.repeats, config.seconds)], waiting


def _enough(count: int, seconds: float) -> Iterator[int]:
    start = time.perf_counter()
    for number in itertools.count():
        if number >= count and time.perf_counter() - start >= seconds:
            return
        yield number


class Waiting:
    """Share of the time since it was made that this thread waited for a processor."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), _waited_seconds()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not say."""
        waited = _waited_seconds()
        if waited is None or self._waited is None:
            return None
        return (waited - self._waited) / (time.perf_counter() - self._start)


def _waited_seconds() -> float | None:
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text(encoding="ascii").split()[1]) / 1e9 if path.exists() else None


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS") or _maxrss_bytes()


def peak_bytes() -> int:
    """The most memory of this process that was ever in RAM."""
    return _status("VmHWM") or _maxrss_bytes()


def _status(field_name: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _maxrss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_matmul() -> MatmulPeak:
    """The matmul rates that a run measures at its start (`train/peak.py`), and how long this process waited."""
    waiting = Waiting()
    rates = matmul_rates(torch.device("cpu"))
    return MatmulPeak(
        {rate.name: rate.flops_per_second for rate in rates},
        {rate.name: rate.spread for rate in rates},
        waiting.share(),
    )
