"""What a verification is about: everything that a bundle states, read once within bounds, and what lies beside it.

Files that need a run beside the bundle (checkpoints, exported weights, data) are looked for only where the caller
says; a path that a bundle states is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError
from fullweight.evidence.bundle import (
    CHECKPOINTS,
    CLAIMS,
    CONFIG,
    COVERAGE,
    EVALUATION,
    LEDGER,
    MANIFEST,
    MODEL,
    PERFORMANCE,
    Bundle,
    RefusedError,
    Stated,
    open_bundle,
    open_plain,
    read_object,
    stated,
)
from fullweight.evidence.lines import EventLine, History, Parameters, Peak, read_history
from fullweight.evidence.performance import FlopsRule
from fullweight.optim.schedule import ScheduleConfig
from fullweight.train.step import LossConfig


class _Part(Config):
    """A section of the configuration, of which only what rules need is named."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Train(_Part):
    num_steps: int = Field(ge=1, le=10**12)
    rows_per_step: int = Field(ge=1, le=10**12)
    seed: int
    loss: LossConfig


class _Optimizer(_Part):
    learning_rate: float = Field(gt=0)


class _Data(_Part):
    row_tokens: int = Field(ge=1, le=10**12)
    seed: int


class _Evaluation(_Part):
    num_samples: int = Field(ge=0)


class Settings(_Part):
    """The part of a run's configuration that its ledger can be held against; no path in it is followed."""

    name: str
    train: _Train
    optimizer: _Optimizer
    schedule: ScheduleConfig
    data: _Data
    eval: _Evaluation


class Layout(Stated):
    """How many ranks a run had, and along which axes."""

    ranks: int = Field(ge=1, le=10**7)


class _Samples(Stated):
    number: int = Field(ge=0)
    merkle_root: str


class _File(Stated):
    name: str
    sha256: str


class DataFacts(Stated):
    """The data that the manifest fixed."""

    files: list[_File]
    merkle_root: str
    train: _Samples
    held_out: _Samples


class RunManifest(Stated):
    """What `manifest.json` said before the first step."""

    format: int
    run: str
    config: dict[str, Any]
    model: dict[str, Any]
    parameters: Parameters
    layout: Layout
    peak: Peak
    data: DataFacts


class KeptCheckpoint(Stated):
    """One generation that the run wrote to the end; `kept`: its manifest is in the bundle."""

    name: str = Field(pattern=r"^step-\d{1,18}(-\d{1,9})?$")
    step: int = Field(ge=0)
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    state_root: str | None
    kept: bool


class Claim(Stated):
    """One sentence that a run makes about itself; `basis` are the rules it stands on."""

    name: str
    statement: str
    value: Any
    unit: str | None
    scope: str
    status: str
    basis: list[str]


@dataclass(frozen=True, eq=False)
class Subject:
    """A bundle, read; `run` is the folder of the run, when there is one beside it, and `with_data` whether its
    data may be read."""

    bundle: Bundle
    history: History
    manifest: RunManifest
    config: dict[str, Any]
    model: dict[str, Any]
    checkpoints: list[KeptCheckpoint]
    claims: list[Claim]
    performance: Any
    evaluation: Any
    coverage: Any  # None without one
    run: Path | None = None
    with_data: bool = False

    def at_hand(self) -> list[tuple[KeptCheckpoint, Path]]:
        """Every generation of which there are bytes: in the bundle itself, or beside it in the run."""
        found = []
        for entry in (entry for entry in self.checkpoints if entry.kept):
            inside = f"checkpoints/{entry.name}/.metadata" in self.bundle.listed
            root = self.bundle.root if inside else self.run
            if root is not None and (path := root / "checkpoints" / entry.name).is_dir():
                found.append((entry, path))
        return found

    @cached_property
    def flops(self) -> FlopsRule | None:
        return FlopsRule.of(self.model, self.manifest.config)

    @cached_property
    def settings(self) -> list[Settings]:
        """The configuration of each segment. Raises RefusedError when one cannot be one."""
        configs = segment_configs(self.manifest.config, self.history)
        return [_settings(values, number) for number, values in enumerate(configs)]


def open_subject(root: Path, run: Path | None = None, with_data: bool = False) -> Subject:
    """Read a bundle; raises RefusedError naming the rule when it cannot be read as one."""
    bundle = open_bundle(root)
    with open_plain(root / LEDGER) as stream:
        history = read_history(stream)
    config, model = (read_object(root, name) for name in (CONFIG, MODEL))
    subject = Subject(
        bundle=bundle,
        history=history,
        manifest=stated(RunManifest, bundle.read_json(MANIFEST), MANIFEST),
        config=config,
        model=model,
        checkpoints=[stated(KeptCheckpoint, v, CHECKPOINTS) for v in _rows(bundle, CHECKPOINTS)],
        claims=[stated(Claim, v, CLAIMS) for v in _rows(bundle, CLAIMS)],
        performance=read_object(root, PERFORMANCE),
        evaluation=bundle.read_json(EVALUATION),
        coverage=read_object(root, COVERAGE) if COVERAGE in bundle.listed else None,
        run=run,
        with_data=with_data,
    )
    assert subject.settings is not None  # refuses what cannot be a configuration
    return subject


def segment_configs(first: Mapping[str, Any], history: History) -> list[dict[str, Any]]:
    """The resolved configuration of each segment: the manifest's, with what each resume says that it changed.

    A resume tells its changes against the configuration of the segment that wrote its checkpoint.
    """
    configs: list[dict[str, Any]] = []
    wrote: dict[str, int] = {}  # segment by the digest of a generation that it wrote
    for placed in history.all:
        line = placed.line
        if not isinstance(line, EventLine):
            continue
        if line.what == "checkpoint":
            wrote[str(line.get("manifest_sha256"))] = placed.segment
        elif line.what == "start" or (line.what == "resume" and not configs):
            configs.append(dict(first))
        elif line.what == "resume":
            base = configs[wrote.get(str(line.get("manifest_sha256")), len(configs) - 1)]
            configs.append(_changed(base, line.get("config_changes")))
    return configs or [dict(first)]


def _changed(base: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    result = dict(base)
    for key, pair in changes.items() if isinstance(changes, dict) else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise RefusedError("ledger.shape", f"config_changes of {key[:60]!r} is no pair of old and new")
        table, parts = result, key.split(".")
        for part in parts[:-1]:
            table[part] = dict(table[part]) if isinstance(table.get(part), dict) else {}
            table = table[part]
        table[parts[-1]] = pair[1]
    return result


def _settings(values: dict[str, Any], segment: int) -> Settings:
    try:
        return Settings.resolve(values, f"the configuration of segment {segment}")
    except ConfigError as error:
        raise RefusedError("bundle.json", str(error)) from None


def _rows(bundle: Bundle, name: str) -> list[Any]:
    value = bundle.read_json(name)
    if not isinstance(value, list):
        raise RefusedError("bundle.json", f"{name} holds no list")
    return value
