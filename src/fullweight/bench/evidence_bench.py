"""What recording costs: the same steps of one run, in turn recorded and not.

A recorded step is a step and then everything that leaves a line of it in the ledger: the reduction over ranks,
FLOPs, expert load, memory, power, the digest of its rows, the chain, the write. The digests are taken by the
loader's thread in a run; here they are taken again where they can be timed, so the share is an upper bound. Steps
differ by more than recording costs, so the share is of the time spent in recording; the difference between the
medians of both kinds of step stands beside it as a check.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fullweight.bench.measure import Waiting
from fullweight.data.loader import batch_digest
from fullweight.evidence.ledger import Ledger
from fullweight.train.assemble import assemble
from fullweight.train.config import RunConfig
from fullweight.train.loop import joined_for, recorded, take_step
from fullweight.train.run_folder import RunFolder

_WARM_UP = 2


@dataclass(frozen=True)
class EvidenceBench:
    """One benchmark; medians over the steps of each kind."""

    steps: int  # of each kind
    step_seconds: float  # not recorded
    recording_seconds: float  # of a recorded step, digests included
    digest_seconds: float  # of its rows
    line_bytes: int
    share: float  # recording / (step + recording)
    difference_seconds: float  # a recorded step less one that is not
    spread: float  # of steps that are not recorded: (slowest - fastest) / median
    waited_share: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_evidence(config: RunConfig, folder: Path, steps: int) -> EvidenceBench:
    """Time `steps` steps of each kind, in turn; the ledger is written in `folder`."""
    bare, with_record, recording, digests = list[float](), list[float](), list[float](), list[float]()
    with joined_for(config) as ranks:
        run = assemble(config, RunFolder(folder), ranks)
        ledger, waiting = Ledger(folder / "ledger.jsonl"), Waiting()
        try:
            for number in range(_WARM_UP + 2 * steps):
                began = time.perf_counter()
                taken = take_step(run)
                took = time.perf_counter() - began
                if number < _WARM_UP:
                    recorded(run, taken)
                elif number % 2:
                    bare.append(took)
                else:
                    for batch in taken.batches:
                        batch_digest(batch)
                    digests.append(time.perf_counter() - began - took)
                    ledger.append("step", run.state.step, recorded(run, taken))
                    with_record.append(time.perf_counter() - began)
                    recording.append(with_record[-1] - took)
            size = ledger.head().size_bytes
        finally:
            ledger.close()
            run.power.close()
            run.state.loader.close()
    step, record = statistics.median(bare), statistics.median(recording)
    return EvidenceBench(
        steps=steps,
        step_seconds=step,
        recording_seconds=record,
        digest_seconds=statistics.median(digests),
        line_bytes=size // steps,
        share=record / (step + record),
        difference_seconds=statistics.median(with_record) - step,
        spread=(max(bare) - min(bare)) / step,
        waited_share=waiting.share(),
    )
