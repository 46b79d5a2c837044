"""How many rows the router is taken to send where, since tensors without data cannot say.

Three cases: `uniform`, every expert the same; `measured`, this rank's experts all carry the largest load that a
run's ledger recorded, as a multiple of the mean; `worst`, every token of every rank picks as many of this rank's
experts as it can. The first is what the balance rules aim at, the second what a run met, the third cannot be
exceeded by a dropless layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fullweight.core.errors import CheckpointError, ConfigError
from fullweight.evidence.ledger import read

Kind = Literal["uniform", "measured", "worst"]


@dataclass(frozen=True)
class Routing:
    """`factor` is the load of this rank's experts over the mean load, before the bound of `worst`."""

    kind: Kind = "uniform"
    factor: float = 1.0

    @staticmethod
    def parse(text: str) -> Routing:
        """From `uniform`, `worst`, or the path of a run folder or its ledger. Raises ConfigError."""
        if text == "uniform":
            return Routing()
        if text == "worst":
            return Routing("worst", float("inf"))
        path = Path(text)
        ledger = path / "ledger.jsonl" if path.is_dir() else path
        if not ledger.is_file():
            raise ConfigError(f"--routing {text}: expected uniform, worst, or a run folder with a ledger.jsonl")
        return Routing("measured", _largest_load(ledger))

    def received(self, rows: int, expert_ranks: int, top_k: int, num_local: int) -> int:
        """Rows that this rank's experts get when each of `expert_ranks` ranks sends out `rows` choices."""
        tokens = rows // top_k
        most = tokens * expert_ranks * min(top_k, num_local)
        return int(min(rows * self.factor, most)) if self.factor != float("inf") else most

    def __str__(self) -> str:
        if self.kind == "measured":
            return f"measured, {self.factor:.2f} times the mean"
        return str(self.kind)


def _largest_load(ledger: Path) -> float:
    found = []
    try:
        for entry in read(ledger):
            if entry["kind"] == "step":
                found.append(float(entry["experts"]["max_over_mean"]))
    except CheckpointError as error:
        raise ConfigError(f"{error}; give the ledger of a run") from None
    if not found:
        raise ConfigError(f"{ledger} has no step yet, so no load was measured; use --routing uniform or worst")
    return max(found)
