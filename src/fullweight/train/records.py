"""Where the numbers of a run go: the ledger, the trackers, the screen. Only rank 0 writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullweight.core.ledger_head import LedgerHead
from fullweight.evidence.ledger import Ledger
from fullweight.train.progress import Reporter
from fullweight.train.run_folder import write_json
from fullweight.train.trackers import Trackers, flatten


@dataclass
class Records:
    """Where rank 0 writes numbers; other ranks hold none of it."""

    ledger: Ledger | None
    trackers: Trackers | None
    reporter: Reporter
    _files: dict[Path, Any] = field(default_factory=dict)  # to be written, by path
    _full: bool = False  # whether the disk refused something that is held back
    _step: int = 0  # the newest that a line was about; trackers go forward only

    def begin(self, what: str, step: int, values: dict[str, Any]) -> None:
        """The ledger line that this segment of the run begins with."""
        if self.ledger is not None:
            self._follow(self.ledger.begin(what, step, values), "event", step, values)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One ledger line, and its numbers to the trackers. What the disk refuses is held back and tried again."""
        if self.ledger is not None:
            self._follow(self.ledger.append(kind, step, values), kind, step, values)

    def keep(self, path: Path, value: Any) -> None:
        """Write a JSON file beside the ledger, now or once there is room."""
        if self.ledger is not None:
            self._files[path] = value
            self._tell(self._write_files())

    def head(self) -> LedgerHead | None:
        """The ledger so far; None on other ranks."""
        return None if self.ledger is None else self.ledger.head()

    def sync(self) -> None:
        """Have every line so far on the disk; raises OSError when it refuses."""
        if self.ledger is not None:
            self.ledger.sync()

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if self.trackers is not None:
            self.trackers.close()

    def _follow(self, refusal: OSError | None, kind: str, step: int, values: dict[str, Any]) -> None:
        self._tell(refusal or self._write_files())
        self._step = max(self._step, step)
        if self.trackers is not None:
            self.trackers.log(self._step, flatten(values, "" if kind == "step" else f"{kind}/"))

    def _write_files(self) -> OSError | None:
        try:
            for path in list(self._files):
                write_json(path, self._files[path])
                del self._files[path]
        except OSError as error:
            return error
        return None

    def _tell(self, refusal: OSError | None) -> None:
        if refusal is not None and not self._full:
            self._say(f"{refusal}; lines of the ledger are held back and written once there is room")
        elif refusal is None and self._full:
            self._say("there is room again, and every line that was held back is in the ledger")
        self._full = refusal is not None

    def _say(self, text: str) -> None:
        self.reporter.say("[bold red]disk[/]: " + text.replace("[", "\\["))
