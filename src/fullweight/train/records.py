"""Where the numbers of a run go: the ledger, the trackers, the screen. Only rank 0 writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fullweight.checkpoint.manifest import LedgerHead
from fullweight.train.ledger import Ledger
from fullweight.train.progress import Reporter
from fullweight.train.trackers import Trackers, flatten


@dataclass
class Records:
    """Where rank 0 writes numbers; other ranks hold none of it."""

    ledger: Ledger | None
    trackers: Trackers | None
    reporter: Reporter

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One ledger line, and its numbers to the trackers."""
        if self.ledger is None:
            return
        self.ledger.append(kind, step, values)
        if self.trackers is not None:
            self.trackers.log(step, flatten(values, "" if kind == "step" else f"{kind}/"))

    def head(self) -> LedgerHead | None:
        """The ledger so far, on disk; None on other ranks."""
        return None if self.ledger is None else self.ledger.head()

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if self.trackers is not None:
            self.trackers.close()
