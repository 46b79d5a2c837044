"""The command line on a machine whose processor counts energy: a folder as Linux's powercap has it.

`main` is for `tests.processes.fullweight(call=...)`. Before each reading of the counter 10 J more are in its file,
and it begins anew at 1 kJ; `POWERCAP` in the environment names the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from fullweight.cli import main as program
from fullweight.devices import cpu

JOULES_A_READING, LIMIT = 10, 1000


def main(arguments: list[str]) -> int:
    """The command line, reading energy from the folder."""
    folder = Path(os.environ["POWERCAP"])
    zone = folder / "intel-rapl:0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "max_energy_range_uj").write_text(f"{LIMIT * 10**6}\n")
    honest, readings = cpu.energy_joules, 0

    def counted(root: Path | None = None) -> dict[str, tuple[float, float]] | None:
        nonlocal readings
        readings += 1
        (zone / "energy_uj").write_text(f"{readings * JOULES_A_READING % LIMIT * 10**6}\n")
        return honest(folder)

    cpu.energy_joules = counted
    return program.main(arguments)
