"""A run's checkpoints as the loop sees them: save now, say what became of it, stop when nothing can be written.

The writing itself, in the background, is `checkpoint/async_save.py`. Here are the facts that go with a state,
the ledger lines (`checkpoint_begun` with the stall, then `checkpoint` once it is complete on the disk, or
`checkpoint_failed`) and what a person sees. The line of a complete one is about the step that was saved, however
far training has come since: it stands as long as that step does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata

import torch
from rich.text import Text

from fullweight.checkpoint.async_save import Failure, Report, Saver, Stall
from fullweight.checkpoint.generations import locked
from fullweight.checkpoint.imported import seal_of
from fullweight.checkpoint.manifest import Facts, LedgerHead
from fullweight.core import phase
from fullweight.core.errors import TrainingError
from fullweight.parallel.mesh import Ranks
from fullweight.train.assemble import Run
from fullweight.train.records import Records
from fullweight.train.run_folder import RunFolder

_LOOK_SECONDS = 0.2


class Saving:
    """Saves of one run; all ranks call every method together, except `report`."""

    def __init__(self, run: Run, records: Records) -> None:
        self.run, self.records = run, records
        self._saver = Saver(run.folder.checkpoints, run.config.checkpoint)
        self._stalls: dict[int, Stall] = {}
        self._last_step = run.state.step if run.state.step else None

    @property
    def gave_up(self) -> bool:
        """Whether writing failed too often; ranks may learn it at different times."""
        return self._saver.gave_up is not None

    def save(self) -> None:
        """Save the state as it is, unless it was saved already."""
        state = self.run.state
        if self._last_step == state.step:
            return
        phase.enter("checkpoint")
        described = facts(self.run, self.records.head())
        stall = self._saver.save(state.tensors(), described, self.records.sync)
        self._stalls[state.step], self._last_step = stall, state.step
        self.records.write("event", state.step, {"what": "checkpoint_begun", **asdict(stall)})
        self.report()

    def report(self) -> None:
        """Tell what became of earlier saves; cheap when nothing did."""
        for report in self._saver.reports():
            self._tell(report)

    def finish(self) -> None:
        """Wait for the last save. Raises TrainingError when checkpoints can no longer be written."""
        phase.enter("checkpoint", "waiting for the last")
        while not self._saver.wait(_LOOK_SECONDS):
            self.report()
        self.run.ranks.barrier()  # a rank that ends now would cut off what others' writers still exchange
        self.report()
        failure = self._saver.gave_up
        if failure is not None:
            raise TrainingError(
                f"stopped after step {self.run.state.step}: {failure.attempt} attempts in a row to save step "
                f"{failure.step} failed, the last one: {failure.reason}. Earlier checkpoints are untouched; mend "
                f"that, then continue with `fullweight resume {self.run.folder.root}`"
            )

    def settle(self) -> None:
        """After another failure: let the save in flight end, so that it is not lost too."""
        self._saver.wait()
        self.report()

    def _tell(self, report: Report) -> None:
        step, say = self.run.state.step, self.records.reporter.say
        if isinstance(report, Failure):
            values = {"saving": report.step, "attempt": report.attempt, "reason": report.reason}
            self.records.write("event", step, {"what": "checkpoint_failed", **values})
            limit = self.run.config.checkpoint.max_failures
            failed = Text("checkpoint failed", "bold red")
            say(failed.append(f" (attempt {report.attempt} of {limit}): {report.reason}", "not bold default"))
            return
        generation = report.path.name
        saved_step = int(generation.split("-")[1])
        values = {
            "generation": generation,
            "manifest_sha256": report.sha256,
            "size_bytes": report.size_bytes,
            "seconds": report.seconds,
            "removed": list(report.removed),
        }
        self.records.write("event", saved_step, {"what": "checkpoint", **values})
        stall = self._stalls.pop(saved_step)
        how = "" if stall.synchronous is None else f" (not in the background: {stall.synchronous})"
        say(
            f"checkpoint {generation}: {report.size_bytes / 1e6:,.1f} MB written and verified in "
            f"{report.seconds:.1f} s, training waited {stall.seconds:.2f} s{how}"
        )


def facts(run: Run, ledger: LedgerHead | None) -> Facts:
    """What the run's state is of."""
    return Facts(
        step=run.state.step,
        model=run.architecture.to_published(),
        config=run.config.model_dump(mode="json", exclude={"output"}),
        world={"ranks": run.ranks.size, "axes": run.ranks.layout.axes()},
        position=run.state.position(),
        ledger=ledger,
        source=seal_of(run.folder.source) if run.ranks.is_main else None,  # rank 0 alone writes it
        versions={"fullweight": metadata.version("fullweight"), "torch": str(torch.__version__)},
    )


@contextmanager
def owned(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Be the only run that writes in `folder`; raises CheckpointError when another one does."""
    with ExitStack() as held:
        with ranks.main_first_failure():
            if ranks.is_main:
                held.enter_context(locked(folder.checkpoints))
        yield
