"""What a run folder says happened, for a replay: its lines, its kept states, and under what they were made.

Nothing of the record is believed: a replay compares it with what happens when the same is done again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullweight.audit.windows import Window
from fullweight.checkpoint import generations
from fullweight.checkpoint.manifest import Facts, Generation, read_manifest
from fullweight.core.errors import CheckpointError
from fullweight.evidence import ledger
from fullweight.evidence import manifest as manifests
from fullweight.evidence.manifest import RunManifest
from fullweight.train.run_folder import RunFolder

_NAMING = "checkpoint"
"""The event that names a generation, when it is complete, and its manifest's digest."""


@dataclass(frozen=True)
class Segment:
    """Steps of a window under one configuration: `first` to `last`."""

    first: int
    last: int
    config: dict[str, Any]

    @property
    def steps(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Recorded:
    """The record of a run; `states` is where its states and its tokenizer are, when not in `folder`."""

    folder: RunFolder
    manifest: RunManifest  # before any resume changed anything
    steps: dict[int, dict[str, Any]]  # the ledger's lines of steps that stand
    events: tuple[dict[str, Any], ...]  # likewise
    head: str  # hex SHA-256 of the ledger's last line
    states: RunFolder

    @staticmethod
    def of(folder: RunFolder, states: RunFolder | None = None) -> Recorded:
        """Read a run folder, or a bundle. Raises CheckpointError or ConfigError when it is none, or is damaged."""
        folder.require()
        manifests.require_bound(folder.manifest, folder.ledger)
        lines = list(ledger.read_all(folder.ledger))
        if not lines:
            raise CheckpointError(f"{folder.ledger} has no lines; there is nothing to repeat")
        standing = [line.entry for line in lines if not line.superseded]
        return Recorded(
            folder,
            manifests.read(folder.manifest),
            {entry["step"]: entry for entry in standing if entry["kind"] == "step"},
            tuple(entry for entry in standing if entry["kind"] == "event"),
            lines[-1].sha256,
            states or folder,
        )

    def kept(self) -> dict[int, Path]:
        """The newest kept generation of each step."""
        return dict(generations.listed(self.states.checkpoints))

    def named(self) -> dict[str, Path]:
        """Every kept generation by its name."""
        return {path.name: path for _, path in generations.listed(self.states.checkpoints)}

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the run's tokenizer; None where it was not kept, as in a bundle."""
        return self.states.tokenizer if self.states.tokenizer.is_dir() else None

    def digest_of(self, generation: str) -> str | None:
        """The digest of a generation's manifest that the ledger holds; None when it names no such generation."""
        found = [
            event["manifest_sha256"]
            for event in self.events
            if event.get("what") == _NAMING
            and event.get("generation") == generation
            and "manifest_sha256" in event
        ]
        return found[-1] if found else None

    def why_not_its(self, generation: Generation) -> str | None:
        """Why a verified generation is not one of this ledger, or None."""
        name, facts = generation.path.name, generation.manifest.facts
        if facts.ledger is not None and (reason := ledger.not_under(self.folder.ledger, facts.ledger)):
            return f"{name} is not a checkpoint of this run's ledger: {reason}"
        told = self.digest_of(name)
        if told is not None and told != generation.sha256:
            return f"{name} is not what the ledger names: its manifest has SHA-256 {generation.sha256}, not {told}"
        return None

    def world_at(self, step: int) -> dict[str, Any]:
        """Ranks and axes under which a step was made, as the first state kept from there on says."""
        for kept, path in sorted(self.kept().items()):
            if kept >= step:
                return dict(read_manifest(path)[0].facts.world)
        return {name: self.manifest.layout.get(name) for name in ("ranks", "axes")}

    def segments(self, window: Window, start: Facts | None) -> list[Segment]:
        """The window cut where a resume changed the configuration; `start` is of the state it starts from."""
        config = self.manifest.config if start is None else start.config
        found: list[Segment] = []
        first = window.start + 1
        for event in self.events:
            if event.get("what") != "resume" or not window.start <= event["step"] < window.stop:
                continue
            changes = _changes(event)
            if not changes:
                continue
            if event["step"] >= first:
                found.append(Segment(first, event["step"], config))
                first = event["step"] + 1
            config = _changed(config, changes)
        return [*found, Segment(first, window.stop, config)]

    def stood_on(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The environment and the code under which the step after `step` was made."""
        environment, code = self.manifest.environment, self.manifest.code
        for event in self.events:
            if event.get("what") in ("start", "resume") and event["step"] <= step:
                # what is absent is as in the manifest
                environment = event.get("environment") or self.manifest.environment
                code = event.get("code") or self.manifest.code
        if not isinstance(environment, dict) or not isinstance(code, dict):
            raise CheckpointError(f"the ledger's start or resume before step {step + 1} tells no environment")
        return environment, code


def _changes(event: dict[str, Any]) -> dict[str, Any]:
    """New values by dotted name of a resume. Raises CheckpointError on anything else."""
    changes = event.get("config_changes", {})
    if not isinstance(changes, dict) or not all(isinstance(p, list) and len(p) == 2 for p in changes.values()):
        raise CheckpointError(f"the ledger's resume of step {event['step']} has damaged config_changes")
    return {name: pair[1] for name, pair in changes.items()}


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with leaves, by dotted name, replaced."""
    result = copy.deepcopy(config)
    for name, value in changes.items():
        *sections, key = name.split(".")
        table = result
        for section in sections:
            table[section] = table.get(section) or {}  # what was None may have become a section
            table = table[section]
            if not isinstance(table, dict):
                raise CheckpointError(
                    f"the ledger changes {name}, and {section} is no section of the configuration"
                )
        table[key] = value
    return result
