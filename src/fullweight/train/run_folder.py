"""The run folder: everything that one run leaves behind, each thing in its one place.

    config.json         the resolved configuration        ledger.jsonl   numbers, one line a step
    model.json          the architecture (published form) checkpoints/   step-N: exact training state
    environment.json    versions, commit, machine         samples/       what the model answered, by step
    tokenizer/          the tokenizer in use              plots/         pictures
    export/             final weights, published names    report.html    one page that shows it all
    import.json         receipt of the weights it began   source/        how those were published: headers, scales
                        with, when from a checkpoint
    boundaries/         what passed between pieces of the model in some steps, step-N
    launch.json         which launch made the folder      stalls/        stacks of ranks that stood still
    manifest.json       what the run began with           coverage.json  what trained, tensor by tensor

A run starts only in a new or empty folder, so two runs never mix.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from fullweight.checkpoint.export import unfinished
from fullweight.core import durable
from fullweight.core.errors import ConfigError
from fullweight.devices import DEVICES, absent, find, of
from fullweight.doctor.applied import current
from fullweight.doctor.environment import recorded
from fullweight.evidence import ledger
from fullweight.train import code

_PACKAGES = (
    *("fullweight", "torch", "numpy", "pydantic", "tokenizers", "datasets", "pyarrow", "safetensors"),
    *(package for kind in DEVICES.values() for package in kind.packages),
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def model(self) -> Path:
        return self.root / "model.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def boundaries(self) -> Path:
        return self.root / "boundaries"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def imported(self) -> Path:
        return self.root / "import.json"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def coverage(self) -> Path:
        return self.root / "coverage.json"

    @property
    def launch(self) -> Path:
        return self.root / "launch.json"

    @property
    def stalls(self) -> Path:
        return self.root / "stalls"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def picture(self) -> Path:
        return self.root / "plots" / "loss.png"

    def check_free(self, again: bool = False) -> None:
        """Raise ConfigError when the folder holds something already; with `again`, beside what `clear` leaves."""
        kept = [self.stalls, *((self.launch, self.ledger, self.manifest) if again else ())]
        if not again and self.launch.is_file() and not self.config.is_file():
            raise ConfigError(
                f"{self.root} is not empty: a run is being begun there, or was killed before it had begun; delete "
                "the folder if no process is at it, or choose another --output"
            )
        if self.root.exists() and (not self.root.is_dir() or any(p not in kept for p in self.root.iterdir())):
            raise ConfigError(
                f"{self.root} is not empty; choose another --output, or continue it with "
                f"`fullweight resume {self.root}`"
            )

    def create(self, made_by: dict[str, Any], again: bool = False) -> None:
        """Make the folder, and first of all write who makes it; raises ConfigError as `check_free`."""
        self.check_free(again)
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.launch, made_by)
        self.samples.mkdir()

    def clear(self) -> None:
        """Remove what a run without a checkpoint left, but for who made it, stacks, its ledger and manifest.

        Earlier attempts stay in the ledger's chain; without a line of it no manifest is bound, and both go.
        """
        if self.ledger.is_file():
            ledger.mend(self.ledger)
        if not self.ledger.is_file() or not self.ledger.stat().st_size:
            for path in (self.ledger, self.manifest):
                path.unlink(missing_ok=True)
        files = (self.config, self.model, self.environment, self.imported, self.report, self.coverage)
        for path in files:
            path.unlink(missing_ok=True)
            durable.temporary(path).unlink(missing_ok=True)
        folders = (
            self.tokenizer,
            self.samples,
            self.checkpoints,
            self.boundaries,
            self.export,
            self.source,
            self.picture.parent,
        )
        for path in (*folders, *unfinished(self.source), *unfinished(self.export)):
            if path.exists():
                shutil.rmtree(path)

    def require(self) -> None:
        """Raise ConfigError unless this is a run folder."""
        if not self.config.is_file():
            raise ConfigError(f"{self.root} is not a run folder: it has no config.json; give the folder of a run")


def free_name(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that is not taken."""
    candidate, number = wanted, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that a reader never meets half a file."""
    durable.write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """What the run stood on: versions, commit, machine. A source tree outside git has commit None."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **code.commit(),
        "machine": {
            "system": platform.platform(),
            "processor": find("cpu").chip(),
            "cpu_count": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "device": described(device),
        "variables": recorded(os.environ),
        "variables_of_recipe": asdict(current()),
        "ranks": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def described(device: torch.device) -> dict[str, Any]:
    """The device of this rank for the record, and why others were not to be had; None is unknown."""
    kind = of(device)
    return {"name": kind.name, "chip": kind.chip(), **asdict(kind.topology()), "absent": absent()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
